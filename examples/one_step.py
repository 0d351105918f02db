"""A family of three networks, trained for one step together, one of them taken out."""

import torch

import detachnet

torch.manual_seed(0)
model = detachnet.create_model("detachnet:vgg16_cifar", width=0.25)
net = detachnet.make_detachable(
    model,
    {
        "front": detachnet.SubModel(drop=[":features.23"]),  # the paper's: without its front
        "inner": detachnet.SubModel(drop=["features.16:features.22", "features.26:features.32"]),
    },
)
print(net.plan)

images, target = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
loss = detachnet.MultiModelLoss()(net.train()(images, which="all"), target)
loss.backward()
optimizer.step()
print(f"loss {loss.item():.2f}")

small = net.detach("inner")  # a plain module with its own copy of the weights
print(tuple(small(images).shape), sum(p.numel() for p in small.parameters()), "parameters")
