"""The kernels in a bare PyTorch loop: REINFORCE on a small recurrent model of your own.

python examples/kernels_alone.py
No trainer, no transformers: ``sample_token`` draws, ``group_advantage`` compares the responses of a group, and
``linear_loss`` goes from hidden rows to the gradient without keeping [tokens, vocabulary] logits.
"""

import torch
from torch import nn

from isomorph.kernels.advantage import group_advantage
from isomorph.kernels.linear_logprob import linear_loss
from isomorph.kernels.sample_token import sample_token

V, D, G, LEN, GOLD = 50, 32, 16, 8, 7  # vocabulary, width, responses of a group, their length, the rewarded token
torch.manual_seed(0)
embedding, recurrence, unembedding = nn.Embedding(V, D), nn.GRU(D, D, batch_first=True), nn.Linear(D, V, bias=False)
parameters = [*embedding.parameters(), *recurrence.parameters(), *unembedding.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-2)
offsets = torch.tensor([0, G])  # one group of G responses

for step in range(40):
    tokens = torch.zeros(G, 1, dtype=torch.int64)  # all begin with token 0
    with torch.no_grad():
        state = None
        for position in range(LEN):
            hidden, state = recurrence(embedding(tokens[:, -1:]), state)
            keys = 1000 * step + torch.arange(G)  # of the noise: one for each response
            drawn, _ = sample_token(unembedding(hidden[:, 0]), keys, torch.full((G,), position), temperature=1.0)
            tokens = torch.cat([tokens, drawn[:, None]], 1)
    rewards = (tokens[:, 1:] == GOLD).float().mean(1)
    advantage = group_advantage(rewards, offsets, baseline="mean", scale="std").repeat_interleave(LEN)

    hidden, _ = recurrence(embedding(tokens[:, :-1]))
    loss = linear_loss(
        hidden.reshape(-1, D),
        unembedding.weight,
        tokens[:, 1:].flatten(),
        lambda stats, rows: -(advantage[rows] * stats.logprob).mean() * len(advantage[rows]) / (G * LEN),  # noqa: B023
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 4:
        print(f"step {step + 1:2}  share of the rewarded token {rewards.mean():.3f}")
