"""The residual networks for small images (He et al. 2016, section 4.2): 6n + 2 layers in three stages."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """relu(x' + bn(conv(relu(bn(conv(x)))))), where x' is x, or its every second pixel with zero channels added.

    Shortcuts without parameters are the paper's option A.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(out + x)


class ResNet(nn.Module):
    """ResNet-``depth`` for images of 16 pixels and more: stages of width, 2 width and 4 width channels.

    ``depth`` is 6n + 2 (20, 56, 110, ...); the paper's width is 16.
    """

    def __init__(self, depth: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(*(self._stage(i, (depth - 2) // 6, width) for i in range(3)))
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(number: int, blocks: int, width: int) -> nn.Sequential:
        outputs = width << number
        inputs = outputs if number == 0 else outputs // 2
        first = Block(inputs, outputs, 1 if number == 0 else 2)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def features(self, images: Tensor) -> Tensor:
        """Map [B, C, H, W] to the averaged maps before the head, [B, 4 width]."""
        return torch.flatten(F.adaptive_avg_pool2d(self.stages(F.relu(self.bn(self.conv(images)))), 1), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, C, H, W] to logits [B, classes]."""
        return self.head(self.features(images))
