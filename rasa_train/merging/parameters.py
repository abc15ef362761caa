"""Read the weights of a model on disk, one at a time, by the names of the parameters in memory; and check that two such
models have the same shapes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.site import Site
from ..errors import UserError
from ..io.checkpoint_files import FLOATS, Stored, open_checkpoint
from ..models.classifier import stored_head
from ..models.config import ModelConfig
from ..models.load import load_config, tied_groups
from .names import Piece, locate
from .source import architecture


class Weights:
    """The weights of a model directory. The constructor reads only headers."""

    def __init__(self, directory: Path) -> None:
        stored = open_checkpoint(directory).tensors
        self.directory = directory
        self.model = architecture(directory, stored_head(load_config(ModelConfig(name=str(directory)))))
        self.shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters(remove_duplicate=False)}
        self.pieces: dict[str, list[tuple[Piece, Stored]]] = {}
        for name, piece in locate(self.model, {name: tensor.shape for name, tensor in stored.items()}).items():
            self.pieces.setdefault(piece.parameter, []).append((piece, stored[name]))
        for group in tied_groups(self.model):
            for held in [self.pieces[name] for name in group if name in self.pieces][:1]:
                self.pieces = dict.fromkeys(group, held) | self.pieces

    def read(self, parameter: str) -> Tensor:
        """Return one parameter, fp32, assembled if the files hold it in pieces.

        Raises:
            UserError: the parameter is absent, stored in a layout that cannot be read, of another shape than the
                configuration gives, or not finite.
        """
        pieces, shape = self.pieces.get(parameter, []), self.shapes.get(parameter)
        if not pieces or shape is None or any(piece.unknown for piece, _ in pieces):
            raise UserError(
                f"{self.directory} has no tensor for {parameter}, or holds it in a layout that cannot be read"
            )
        whole = torch.empty(shape)
        for piece, stored in pieces:
            if stored.dtype not in FLOATS:
                raise UserError(f"{stored.name} in {stored.path} is {stored.dtype}: a quantised model cannot be read")
            place = piece.of(whole)
            if place.shape != stored.shape:
                raise UserError(
                    f"{stored.name} in {stored.path} has shape {stored.shape}, but the model's {parameter} needs "
                    f"{tuple(place.shape)}: config.json and the weights do not belong to one model"
                )
            place.copy_(stored.read())
        if not torch.isfinite(whole).all():
            raise UserError(f"{parameter} in {self.directory} has values that are not finite")
        return whole

    def weight(self, site: Site) -> Tensor:
        """Return W of a site (*lead, out, in), fp32."""
        return site.view(self.read(site.weight))


def check_finetuned(base: Weights, tuned: Weights, sites: Iterable[Site]) -> None:
    """Raise ``UserError`` unless ``tuned`` has the weights of all sites in the shapes of ``base``."""
    for site in sites:
        if (found := tuned.shapes.get(site.weight)) != base.shapes[site.weight]:
            is_ = "absent" if found is None else f"{found}, not {base.shapes[site.weight]}"
            raise UserError(
                f"{tuned.directory} is not a fine-tuned version of {base.directory}: its {site.weight} is {is_}"
            )
