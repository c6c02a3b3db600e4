"""A reward function as users of verl write it, with one of the other names that its managers know."""

import re


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    found = re.findall(r"#### (-?[0-9.,]+)", solution_str)
    if not found:
        return 0.0
    is_right = found[-1].replace(",", "") == ground_truth
    return {"score": 1.0 if is_right else 0.1, "acc": is_right, "source": data_source}


def compute_score_batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [len(text) + info["index"] for text, info in zip(solution_strs, extra_infos, strict=True)]
