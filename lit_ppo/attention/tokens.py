"""The real tokens of padded rows, packed end to end."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_ppo.attention.kernels import Kernel
from lit_ppo.device import product_rows
from lit_ppo.functional import no_mask, to_device


@dataclass(frozen=True)
class Packing:
    """Where the N packed tokens of some rows, one row after another, lie among the rows padded on the right."""

    taken: Tensor  # (N,), the number of each packed token in the flattened (rows, longest)
    rows: int
    longest: int
    starts: Tensor | None = None  # (rows + 1,), int32, each row's first packed token; for a kernel
    kernel: Kernel | None = None


@dataclass(frozen=True)
class RealTokens:
    """The N real tokens among (B, L), one row after another, wherever the padding was.

    If they are filled up, some padding follows the first rows, as tokens that no real token sees.
    Masks on the host spare a GPU a synchronisation; what is for the models lies with the ids.
    """

    ids: Tensor  # (N,)
    positions: Tensor  # (N,), each one's place in its row
    number: Tensor  # (B, L), on the mask's device: each real token's number
    packing: Packing

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor, kernel: Kernel | None = None, *, fill: bool = False
    ) -> "RealTokens":
        """Leave the padding out.

        Args:
            input_ids: Token ids.
            attention_mask: True at real tokens.
            kernel: Of attention.
            fill: Fill up to the number of tokens that products should have (:func:`lit_ppo.device.product_rows`), as
                far as there is padding.
        """
        device = input_ids.device
        mask = attention_mask.bool().flatten()
        lengths = attention_mask.sum(1, keepdim=True)
        longest = int(lengths.max())
        steps = torch.arange(longest, device=mask.device)
        real = steps < lengths
        where, kept, number = mask.nonzero().squeeze(1), real, mask.cumsum(0) - 1
        wanted = product_rows(len(where), device) if fill else len(where)
        if wanted > len(where):
            kept = (real.flatten() | ((~real).flatten().cumsum(0) <= wanted - len(where))).view(real.shape)
            number = number.masked_scatter(mask, (kept.flatten().cumsum(0) - 1)[real.flatten()])
            where = where.new_zeros(real.shape).masked_scatter(real, where)[kept]
        starts = None
        if kernel is not None:
            starts = to_device(torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0)).int(), device)
        return cls(
            ids=input_ids.flatten().index_select(0, to_device(where, device)),
            positions=to_device(steps.expand(real.shape)[kept], device),
            number=number.view(attention_mask.shape),
            packing=Packing(
                to_device(kept.flatten().nonzero().squeeze(1), device), len(lengths), longest, starts, kernel
            ),
        )

    def packed(self) -> dict[str, Any]:
        """What a backbone reads, as one row of N tokens."""
        return {
            "input_ids": self.ids.unsqueeze(0),
            "position_ids": self.positions.unsqueeze(0),
            "attention_mask": no_mask(self.ids.device),
            "packing": self.packing,
        }

    def side_by_side(self) -> dict[str, Any]:
        """What a backbone reads whose attention takes no packing: (rows, longest), padded on the right."""
        shape = self.packing.rows, self.packing.longest
        empty = torch.zeros(shape[0] * shape[1], dtype=torch.long, device=self.ids.device)
        return {
            "input_ids": empty.index_copy(0, self.packing.taken, self.ids).view(shape),
            "attention_mask": empty.index_fill(0, self.packing.taken, 1).view(shape),
        }
