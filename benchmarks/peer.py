"""The same VAE in PyTorch, for comparing speed: the same layers, objective and optimizer, written as one would there.

With the post's shortcuts, SHORTCUT=projection. channels_last, fused AdamW, autocast for bfloat16, a loss from logits;
eager or compiled.
"""

import torch
from torch import nn
from torch.nn import functional

from resnet_vae.config import DOWNSAMPLING
from resnet_vae.networks import LOG_VAR_RANGE, stages

EPSILON = 1e-3  # Keras's


class Bottleneck(nn.Module):
    """A bottleneck block, (batch, channels, height, width); see `resnet_vae.blocks.ResidualBlock`."""

    def __init__(self, channels, filters, stride, transpose, projection, momentum, gain):
        super().__init__()
        first, middle, last = filters

        def strided(outputs):
            if transpose and stride > 1:  # without a stride it is the same function
                return nn.ConvTranspose2d(channels, outputs, 1, stride, output_padding=stride - 1)
            return nn.Conv2d(channels, outputs, 1, stride)

        def normalization(outputs):
            return nn.BatchNorm2d(outputs, EPSILON, 1 - momentum)

        self.conv1, self.bn1 = strided(first), normalization(first)
        self.conv2, self.bn2 = nn.Conv2d(first, middle, 3, padding=1), normalization(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, last, 1), normalization(last)
        if not projection:
            nn.init.constant_(self.bn3.weight, gain)
        self.shortcut = nn.Sequential(strided(last), normalization(last)) if projection else nn.Identity()

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def chain(channels, config, transpose=False):
    """The blocks of the encoder or the decoder; returns them and the number of channels that come out."""
    gain = 0.0 if config.initialization == "identity" else 1.0
    blocks = []
    for count, filters, strides in stages(config, transpose):
        for block in range(count):
            stride = 1 if block else strides[0]
            blocks.append(Bottleneck(channels, filters, stride, transpose, not block, config.norm_momentum, gain))
            channels = filters[-1]
    return nn.Sequential(*blocks), channels


class VAE(nn.Module):
    """Images (batch, channels, height, width) in uint8 → the loss, nats per image."""

    def __init__(self, config, image_shape):
        super().__init__()
        height, width, channels = image_shape
        self.rows, self.columns, units = height // DOWNSAMPLING, width // DOWNSAMPLING, config.intermediate_dim
        self.encoder, features = chain(channels, config)
        self.encoder_dense = nn.Linear(features, units)
        self.encoder_bn = nn.BatchNorm1d(units, EPSILON, 1 - config.norm_momentum)
        self.mean = nn.Linear(units * self.rows * self.columns, config.latent_dim)
        self.log_var = nn.Linear(units * self.rows * self.columns, config.latent_dim)
        depth = -(-units // (self.rows * self.columns))
        self.decoder_dense = nn.Linear(config.latent_dim, depth * self.rows * self.columns)
        self.decoder_bn = nn.BatchNorm1d(depth * self.rows * self.columns, EPSILON, 1 - config.norm_momentum)
        self.decoder, features = chain(depth, config, transpose=True)
        self.image = nn.Conv2d(features, channels, 1)

    def forward(self, images):
        images = images.float() / 255
        x = self.encoder(images).permute(0, 2, 3, 1)  # (batch, rows, columns, features), as Keras flattens
        x = self.encoder_dense(x)
        x = functional.relu(self.encoder_bn(x.reshape(-1, x.shape[-1]))).reshape(len(images), -1)
        x = x / (self.rows * self.columns)
        mean, log_var = self.mean(x).float(), self.log_var(x).float().clamp(*LOG_VAR_RANGE)
        with torch.autocast(images.device.type, enabled=False):
            latents = mean + torch.exp(log_var / 2) * torch.randn_like(mean)
            kl = 0.5 * (mean.square() + torch.expm1(log_var) - log_var).sum() / len(images)
        x = functional.relu(self.decoder_bn(self.decoder_dense(latents)))
        x = x.reshape(len(images), self.rows, self.columns, -1).permute(0, 3, 1, 2)
        logits = self.image(self.decoder(x.contiguous(memory_format=torch.channels_last))).float()
        with torch.autocast(images.device.type, enabled=False):
            reconstruction = functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
            return reconstruction + kl


def make_step(config, compiled, bfloat16):
    """A function that does training steps on uint8 batches (batch, height, width, channels): losses, not waited for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    vae = VAE(config, config.image_shape).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        vae.parameters(),
        config.learning_rate,
        (0.9, config.adam_beta_2),
        eps=1e-7,
        weight_decay=config.weight_decay,
        fused=True,
    )
    forward = torch.compile(vae) if compiled else vae

    def step(images):
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # the memory stays as it is: channels last
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = forward(x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_(vae.parameters(), config.clip_norm)
        optimizer.step()
        return loss.detach()

    return step
