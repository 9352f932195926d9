"""Prune a network of your own in ten lines. Nothing is needed but torch; the digits come with scikit-learn.

python examples/prune_my_model.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import distprune as dp

# Your own network and data: a perceptron on handwritten digits, 1,797 images of 8x8 pixels.
torch.manual_seed(0)
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(images))
images, labels = images[order].float() / 16, labels[order].long()
loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=50, shuffle=True)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def train(epochs: int) -> None:
    """Any training loop will do: yours stays as it is."""
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()


def show(what: str) -> None:
    """Accuracy on images that are not trained on, and how many weights are not zero."""
    with torch.no_grad():
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    kept = sum(int(module.weight.count_nonzero()) for module in model if isinstance(module, nn.Linear))
    print(f"{what:<28} accuracy {accuracy:.3f}   {kept:>6,} weights")


train(epochs=5)
show("dense")

# --- the ten lines -----------------------------------------------------------------------------------------------------------
# Masks keep 3 % of the weights. The model is left as it is until they are applied.
masks = dp.prune(model, sparsity=0.97, criterion="magnitude", allocator="erk")
print(masks)
masks.apply_(model)
show("pruned, not trained since")

# Two epochs of fine-tuning. Momentum and weight decay would bring removed weights back: `hold` does not let them.
with dp.hold(model, masks, optimizer):
    train(epochs=2)
show("fine-tuned for two epochs")

masks.save("masks.safetensors")  # bool tensors that anything reads
# -----------------------------------------------------------------------------------------------------------------------------

# Other scores look at data: give them batches, or a whole loader, of which no more is read than is needed.
for criterion in ("random", "snip", "taylor"):
    found = dp.prune(model, sparsity=0.99, criterion=criterion, batches=loader)
    print(f"{criterion:<10} keeps of each layer: {', '.join(f'{count / found[name].numel():.1%}' for name, count in found.counts.items())}")

# Masks alone make nothing smaller or faster. Whole units do: half of each layer's are taken out for good.
units = dp.prune(model, sparsity=0.5, granularity="filter", batches=loader)
small = dp.shrink(model, units, images[:1])
sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (model, small)]
print(f"taken out for good: {sizes[0]:,} parameters become {sizes[1]:,}")
print(small)
