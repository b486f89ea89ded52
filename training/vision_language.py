"""Pictures and words: what a robot sees, said, asked and found again.

    model = VisionLanguageModel((3, 96, 128), text_vocab_size=60, fusion_dim=128)
    seen = model.encode_image(frames)                   # a picture's cells and its embedding
    model.encode_text(texts) @ seen.embedding.T         # how well each text fits each picture
    model.generate(seen, model.begin(len(frames)))      # captions, word by word
    model.generate(seen, questions)                     # answers: a question ends with "ask"

The picture is a grid of cells; what is remembered across frames and what the embedding is made of passes spikes and a
liquid cell. Captions and answers come from one decoder that attends to the cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.cells import LIF, CfC
from training.nets import centred

PADDING = 0
SPECIALS = ("begin", "end", "ask", "hidden")  # after the words: a caption begins, a text ends, a question, masked


def special(name: str, words: int) -> int:
    """The token of one of SPECIALS, behind so many words."""
    return 1 + words + SPECIALS.index(name)


class ImageCode(NamedTuple):
    """B pictures, the last of each robot's frames."""

    cells: Tensor  # (B, N, dim): the grid row by row, and behind it what is remembered
    embedding: Tensor  # (B, dim), of length 1
    spikes: Tensor  # (B, T, spiking_units)
    state: tuple[Tensor, Tensor]  # membranes (B, spiking_units), liquid (B, liquid_units)


class Decoded(NamedTuple):
    logits: Tensor  # (B, L, tokens): what comes after each
    attention: list[Tensor]  # by layer (B, heads, L, N): on which cells the decoder looked


class VisionLanguageResult(NamedTuple):
    output: Tensor  # (B, num_classes) or, without classes, (B, L, tokens): what comes after each token of the text
    image_embedding: Tensor  # (B, fusion_dim)
    text_embedding: Tensor  # (B, fusion_dim)
    attention_maps: Tensor | None  # (B, layers, heads, L, rows, cols)


class VisionLanguageModel(nn.Module):
    """See the top of the module.

    Args:
        image_size: (3, h, w). text_vocab_size: words, without padding and specials.
        text_seq_length: tokens of the longest text. fusion_dim: of cells, tokens and embeddings.
        num_classes: of a classifier on top of both; 0: none.
        layers, heads: of the text encoder and of the decoder each. period_s: nominal time between frames.
    """

    def __init__(
        self,
        image_size: tuple[int, int, int] = (3, 224, 224),
        text_vocab_size: int = 10_000,
        text_seq_length: int = 128,
        fusion_dim: int = 512,
        num_classes: int = 0,
        *,
        layers: int = 2,
        heads: int = 4,
        spiking_units: int = 256,
        liquid_units: int = 128,
        tau_s: float = 0.1,
        period_s: float = 0.1,
    ):
        super().__init__()
        if fusion_dim % heads:
            raise ValueError(f"fusion_dim: expected a multiple of the {heads} heads, got {fusion_dim}")
        self.image_size, self.length, self.dim, self.period_s = tuple(image_size), text_seq_length, fusion_dim, period_s
        self.words, self.tokens = text_vocab_size, 1 + text_vocab_size + len(SPECIALS)
        self.image = ImageEncoder(self.image_size, fusion_dim, spiking_units, liquid_units, tau_s, period_s)
        self.word = nn.Embedding(self.tokens, fusion_dim, padding_idx=PADDING)
        self.place = nn.Parameter(torch.randn(text_seq_length, fusion_dim) * 0.02)
        with torch.no_grad():
            self.word.weight.normal_(std=0.02)[PADDING] = 0
        self.text_encoder = nn.ModuleList(Block(fusion_dim, heads, cross=False) for _ in range(layers))
        self.text_embedding = nn.Linear(fusion_dim, fusion_dim)
        self.decoder = nn.ModuleList(Block(fusion_dim, heads, cross=True) for _ in range(layers))
        self.norm = nn.LayerNorm(fusion_dim)
        unsaid = [token in (PADDING, *(map(self.special, ("begin", "ask", "hidden")))) for token in range(self.tokens)]
        self.register_buffer("_unsaid", torch.tensor(unsaid), persistent=False)
        self.log_scale = nn.Parameter(torch.tensor(2.659))  # of similarities: 1 / 0.07, as CLIP begins
        self.classify = nn.Linear(2 * fusion_dim, num_classes) if num_classes else None

    def special(self, name: str) -> int:
        """The token of one of SPECIALS."""
        return special(name, self.words)

    def begin(self, batch: int) -> Tensor:
        """Texts (batch, 1) that a caption begins with."""
        return torch.full((batch, 1), self.special("begin"), device=self.place.device)

    def encode_image(
        self, frames: Tensor, state: tuple[Tensor, Tensor] | None = None, dt: Tensor | None = None
    ) -> ImageCode:
        """frames (B, [T,] 3, h, w) float or (B, [T,] h, w, 3) uint8, dt (B, T, 1) seconds since the frame before."""
        frames = frames if frames.dim() == 5 else frames[:, None]
        cells, current = self.image.look(frames.flatten(0, 1))
        last = cells.unflatten(0, frames.shape[:2])[:, -1]
        return self.image.remember(last, current.unflatten(0, frames.shape[:2]), state, dt)

    def encode_text(self, texts: Tensor) -> Tensor:
        """texts int64 (B, L) -> (B, dim), of length 1."""
        x, there = self.text_states(texts), (texts != PADDING)[..., None]
        mean = (x * there).sum(1) / there.sum(1).clamp(min=1)
        return F.normalize(self.text_embedding(mean).float(), dim=-1)

    def text_states(self, texts: Tensor) -> Tensor:
        """texts int64 (B, L) -> what the text encoder makes of each token (B, L, dim)."""
        hidden = (texts == PADDING)[:, None, None]
        x = self._placed(texts)
        for block in self.text_encoder:
            x, _ = block(x, hidden)
        return self.norm(x)

    def decode(self, texts: Tensor, seen: ImageCode) -> Decoded:
        """What comes after each token of texts int64 (B, L), given the pictures."""
        n = texts.shape[1]
        later = torch.ones(n, n, dtype=torch.bool, device=texts.device).triu(1)
        hidden = later | (texts == PADDING)[:, None, None]
        x, attention = self._placed(texts), []
        for block in self.decoder:
            x, looked = block(x, hidden, seen.cells)
            attention.append(looked)
        return Decoded(self.to_logits(self.norm(x)), attention)

    def to_logits(self, x: Tensor) -> Tensor:
        """(..., dim) -> logits of tokens."""
        return (x @ self.word.weight.T).float()

    @torch.no_grad()
    def generate(self, seen: ImageCode, texts: Tensor, most: int = 32) -> Tensor:
        """The likeliest next words one after the other, (B, n), each row until its end and padding behind it. texts
        (B, L): what is said already; padding stands before a text, not behind it."""
        said = texts.new_zeros(len(texts), 0)
        done = torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
        while said.shape[1] < min(most, self.length - texts.shape[1]) and not done.all():
            logits = self.decode(torch.cat([texts, said], 1), seen).logits[:, -1]
            token = logits.masked_fill(self._unsaid, -torch.inf).argmax(-1)
            done |= token == self.special("end")
            said = torch.cat([said, token.masked_fill(done, PADDING)[:, None]], 1)
        return said

    def forward(self, image: Tensor, text: Tensor, return_attention_maps: bool = False) -> VisionLanguageResult:
        """image as of `encode_image`, text int64 (B, L). Raises ValueError for what does not fit."""
        if text.dim() != 2 or text.shape[1] > self.length or len(text) != len(image):
            raise ValueError(f"text: expected ({len(image)}, up to {self.length}) tokens, got {tuple(text.shape)}")
        seen, words = self.encode_image(image), self.encode_text(text)
        said = self.decode(text, seen) if self.classify is None or return_attention_maps else None
        output = said.logits if self.classify is None else self.classify(torch.cat([seen.embedding, words], -1))
        maps = None
        if return_attention_maps:
            maps = torch.stack(said.attention, 1)[..., :-1].unflatten(-1, self.image.grid)
        return VisionLanguageResult(output, seen.embedding, words, maps)

    def _placed(self, texts: Tensor) -> Tensor:
        """Tokens with their places, which padding before a text does not move."""
        return self.word(texts) + self.place[((texts != PADDING).cumsum(1) - 1).clamp(min=0)]


class ImageEncoder(nn.Module):
    """Frames -> cells; through spikes and a liquid cell over the frames -> what is remembered, and the embedding."""

    QUERIES = 4

    def __init__(
        self,
        image_size: tuple[int, ...],
        dim: int,
        spiking_units: int,
        liquid_units: int,
        tau_s: float,
        period_s: float,
    ):
        super().__init__()
        channels, height, width = image_size
        self.size, self.period_s = image_size, period_s
        self.grid = (-(-height // 8), -(-width // 8))
        self.conv = nn.Sequential(
            nn.Conv2d(channels, 32, 7, 4, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, dim, 3, 1, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(),
        )  # fmt: skip
        # A cell alone sees 31 pixels: enough for a colour, too little to tell a ball from a box near by.
        self.context = nn.Sequential(
            nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(dim, dim, 3, 1, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(),
            nn.Conv2d(dim, dim, 3, 1, 1, bias=False), nn.BatchNorm2d(dim),
        )  # fmt: skip
        self.place = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.randn(self.QUERIES, dim) * dim**-0.5)
        self.value = nn.Linear(dim, dim)
        self.current = nn.Sequential(nn.Linear(self.QUERIES * dim, spiking_units), nn.LayerNorm(spiking_units))
        nn.init.constant_(self.current[1].bias, 0.4)
        self.lif, self.liquid = LIF(spiking_units, tau_s), CfC(spiking_units, liquid_units, period_s)
        self.memory = nn.Linear(liquid_units, dim)
        self.embedding = nn.Linear(liquid_units, dim)

    @property
    def units(self) -> int:
        return self.liquid.units

    def look(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames (B, 3, h, w) float or (B, h, w, 3) uint8 -> cells (B, N, dim), current into the spikes (B, units)."""
        want = [self.size, (*self.size[1:], self.size[0])][frames.dtype == torch.uint8]
        if tuple(frames.shape[1:]) != want:
            sizes = ", ".join(map(str, want))
            raise ValueError(f"image: expected (batch, [time,] {sizes}), got a frame of {tuple(frames.shape[1:])}")
        grid = self.conv(centred(frames))
        grid = F.relu(grid + F.interpolate(self.context(grid), size=self.grid))
        cells = self.norm(grid.float().flatten(2).transpose(1, 2) + self.place)
        looked = (self.query @ cells.transpose(1, 2) * cells.shape[-1] ** -0.5).softmax(-1)
        return cells, self.current((looked @ self.value(cells)).flatten(1)).float()

    def remember(
        self,
        cells: Tensor,
        current: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        dt: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> ImageCode:
        """cells (B, N, dim) of the last frame, current (B, T, units) of all; dt (B, T, 1) seconds; where `keep`
        (B, T, 1) is False there was no frame."""
        batch = len(current)
        dt = torch.full_like(current[..., :1], self.period_s) if dt is None else dt
        v, h = state or (current.new_zeros(batch, self.lif.units), current.new_zeros(batch, self.units))
        keep = torch.ones_like(dt, dtype=torch.bool) if keep is None else keep
        never = torch.zeros_like(keep)
        with torch.autocast(current.device.type, enabled=False):
            spikes, v = self.lif.scan(current, v, dt, keep, never)
            _, h = self.liquid.scan(spikes, h, dt, keep, never)
        embedding = F.normalize(self.embedding(h).float(), dim=-1)
        return ImageCode(torch.cat([cells, self.memory(h)[:, None]], 1), embedding, spikes, (v, h))


class Block(nn.Module):
    """A transformer's block, normalised before each part (Xiong et al. 2020): tokens attend to tokens, and where it
    `looks` to the cells of a picture."""

    def __init__(self, dim: int, heads: int, cross: bool):
        super().__init__()
        self.self_attention = Attention(dim, heads)
        self.cross_attention = Attention(dim, heads) if cross else None
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor, hidden: Tensor, cells: Tensor | None = None) -> tuple[Tensor, Any]:
        x = x + self.self_attention(x, None, hidden)[0]
        looked = None
        if self.cross_attention is not None:
            what, looked = self.cross_attention(x, cells, None)
            x = x + what
        return x + self.feed_forward(x), looked


class Attention(nn.Module):
    """x (B, L, dim) attends to itself, or to `other` (B, N, dim), where `hidden`, broadcast to (B, heads, L, N), is
    False: (B, L, dim), (B, heads, L, N)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, other: Tensor | None, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(x if other is None else other).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, -1e4)
        attention = scores.softmax(-1)
        return self.out((attention @ v).transpose(1, 2).flatten(2)), attention
