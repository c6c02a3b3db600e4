"""The same with log-probabilities computed on packed groups: two lines more. python examples/trl_after.py MODEL"""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from isomorph.engine.adapters.trl import pack_groups


def short(completions, **columns):
    return [1 / (1 + len(text.split())) for text in completions]


trainer = GRPOTrainer(
    model=sys.argv[1],
    reward_funcs=short,
    train_dataset=Dataset.from_dict({"prompt": ["What is 2 + 3?", "What is 4 + 4?"] * 8}),
    args=GRPOConfig(
        output_dir="trl-run",
        per_device_train_batch_size=8,  # a prompt is shared within a micro-batch: as large as memory permits
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
    ),
)
pack_groups(trainer)
trainer.train()
print("losses", [f"{row['loss']:.6f}" for row in trainer.state.log_history if "loss" in row])
