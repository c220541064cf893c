"""MobileNetV2 (Sandler et al. 2018) with the strides that small images want."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Expansion, channels, blocks and stride of the seven stages: the paper's table 2, with stride 2 kept in two of four.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1))
_STEM, _LAST = 32, 1280


def scaled(channels: int, width: float) -> int:
    """Return ``channels`` times ``width``, rounded to a multiple of 8, at least 8 and no more than a tenth below it."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class InvertedResidual(nn.Module):
    """Widen, filter each channel apart, narrow: bn(conv1(relu6(bn(dw3(relu6(bn(conv1(x)))))))), added to x if alike."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen: list[nn.Module] = []
        if expansion > 1:
            widen = [_convolution(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6()]
        self.layers = nn.Sequential(
            *widen,
            _convolution(hidden, hidden, 3, stride, hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            _convolution(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of a width multiplier: images of 28 or 32 pixels reach the head as maps of 4.

    The paper's network, made for 224 pixels, halves five times; this one three times, the first at once, as there. The
    last convolution has max(1, width) * 1280 channels in the paper, width * 1280 here, because at small widths it would
    be most of the net.
    """

    def __init__(self, width: float, channels: int, classes: int) -> None:
        super().__init__()
        inputs = scaled(_STEM, width)
        layers: list[nn.Module] = [_convolution(channels, inputs, 3, 2), nn.BatchNorm2d(inputs), nn.ReLU6()]
        for expansion, outputs, blocks, stride in STAGES:
            for number in range(blocks):
                wide = scaled(outputs, width)
                layers.append(InvertedResidual(inputs, wide, stride if number == 0 else 1, expansion))
                inputs = wide
        last = scaled(_LAST, width)
        layers += [_convolution(inputs, last, 1), nn.BatchNorm2d(last), nn.ReLU6()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(last, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def features(self, images: Tensor) -> Tensor:
        """Map [B, C, H, W] to the averaged maps before the head, [B, 1280 width]."""
        return torch.flatten(F.adaptive_avg_pool2d(self.layers(images), 1), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, C, H, W] to logits [B, classes]."""
        return self.head(self.features(images))
