"""A gradient without a backward pass, in plain PyTorch: no Trainer, any optimizer, a loss that is only ever evaluated.

    python examples/plain_pytorch.py

Fits a small network to a sine. `estimate_gradient` reads the loss at two points along each of four random directions a step;
what it returns goes where a backward pass would have left it.
"""

import torch

from hf_zo import estimate_gradient

STEPS = 2000


def main() -> float:
    """Train, print the loss now and then, and return the last one."""
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 100)[:, None]
    model = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).requires_grad_(False)
    params = dict(model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)

    def loss() -> torch.Tensor:
        return (model(x) - x.sin()).pow(2).mean()

    for step in range(STEPS):
        if step % 500 == 0:
            print(f"step {step}: {loss():.4f}")
        for name, gradient in estimate_gradient(loss, params, step=step, num_directions=4).items():
            params[name].grad = gradient
        optimizer.step()
        schedule.step()
    print(f"step {STEPS}: {loss():.4f}")
    return float(loss())


if __name__ == "__main__":
    main()
