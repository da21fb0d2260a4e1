"""All that the measurements of one recipe share: device, pictures, batches, and the systems on them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from boxwright.benchmark.peer_process import PEERS, PeerProcess, find_serve
from boxwright.benchmark.pictures import given_proposals, kept_batches, open_pictures
from boxwright.benchmark.plan import Plan, computes_in, require_file
from boxwright.benchmark.report import Case
from boxwright.benchmark.system import BoxwrightSystem, System, build_detector
from boxwright.benchmark.torchvision_models import family_of
from boxwright.benchmark.torchvision_peer import TorchvisionSystem, torchvision_peer
from boxwright.checks import check_device
from boxwright.data.dataset import Dataset
from boxwright.data.proposals import ProposalFile
from boxwright.detectors.detector import as_detector
from boxwright.precision import Precision
from boxwright.structures import Batch
from boxwright.training.experiment import build, nearest

OURS = "boxwright"


class Bench:
    """A recipe on its bench. Within its context there are pictures."""

    def __init__(self, plan: Plan) -> None:
        """Resolve the plan.

        Raises:
            ValueError: something that it names is not there.
        """
        require_file(plan.weights, "weights file")
        self.plan = plan
        self.experiment = plan.experiment()
        self.device = check_device(plan.device)
        self.experiment = replace(self.experiment, precision=computes_in(self.device, self.experiment.precision))
        self.peer_precision: Precision = computes_in(self.device, plan.peer_precision or self.experiment.precision)
        self._check_peer()
        self._batches: dict[bool, list[Batch]] = {}
        self.peer_versions: dict[str, str] = {}
        """Of a peer in another process, once it was built."""

    def _check_peer(self) -> None:
        """Find out before any work whether there can be a peer."""
        plan = self.plan
        if not plan.peer:
            if plan.peer_python or plan.peer_precision:
                raise ValueError("--peer-python and --peer-precision are of a peer: name it with --against")
            return
        if plan.peer not in ("torchvision", *PEERS):
            raise ValueError(f"--against {plan.peer}{nearest(plan.peer, ('torchvision', *PEERS))}")
        if (plan.peer == "torchvision") == bool(plan.peer_python):
            raise ValueError(
                "--against torchvision runs in this process: leave --peer-python out"
                if plan.peer_python
                else f"--against {plan.peer}: give --peer-python, an interpreter that has {plan.peer}"
            )
        family_of(self.experiment.model)
        if plan.peer_python:
            find_serve()

    def __enter__(self) -> Bench:
        self._stack = ExitStack()
        if self.plan.threads is not None:
            self._stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.plan.threads)
        self.dataset: Dataset = self._stack.enter_context(open_pictures(self.plan))
        with torch.device("meta"):
            shape = as_detector(build(self.experiment.model, num_classes=len(self.dataset.categories)))
        self.masks = shape.needs_masks
        self.proposals: ProposalFile | None = self._stack.enter_context(
            given_proposals(self.dataset, self.experiment, shape.needs_proposals)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def batches(self, *, training: bool) -> list[Batch]:
        """A few batches in memory."""
        if training not in self._batches:
            self._batches[training] = list(
                kept_batches(
                    self.plan,
                    self.experiment,
                    self.dataset,
                    training=training,
                    masks=self.masks,
                    proposals=self.proposals,
                )
            )
        return self._batches[training]

    def system(self, name: str, *, training: bool, compiled: bool | None = None) -> System:
        """A system on the device, set up for one task.

        Args:
            name: boxwright, or a peer.
            training: whether it will train or infer.
            compiled: whether ours is compiled; None leaves it to the recipe.

        Raises:
            ValueError: there is no such peer, or it has no such model.
        """
        if name in PEERS:
            peer = PeerProcess(
                name,
                self.plan.peer_python,
                self.experiment.model,
                num_classes=len(self.dataset.categories),
                device=self.device,
                precision=self.peer_precision,
                training=training,
            )
            self.peer_versions.update(peer.versions)
            return peer
        batch = self.batches(training=training)[0]
        detector = build_detector(self.plan, self.experiment, self.dataset.categories, batch)
        if name == OURS:
            return BoxwrightSystem(
                detector,
                self.experiment,
                device=self.device,
                training=training,
                compiled=self.experiment.compile if compiled is None else compiled,
            )
        return TorchvisionSystem(
            torchvision_peer(self.experiment.model, detector),
            self.experiment.optimizer,
            device=self.device,
            precision=self.peer_precision,
            training=training,
        )

    def case(self, system: str, *, training: bool) -> Case:
        """What a measurement of a system is of."""
        ours = system == OURS
        batch = self.batches(training=training)[0]
        height, width = batch.images.shape[-2:]
        return Case(
            recipe=self.plan.recipe,
            settings=self.plan.settings,
            system=system,
            task="train" if training else "infer",
            batch=len(batch.images),
            size=(height, width),
            asked_size=self.plan.size,
            precision=self.experiment.precision if ours else self.peer_precision,
            compiled=ours and training and self.experiment.compile,
            pictures=Path(self.plan.data).resolve().name if self.plan.data else "generated",
            weights=Path(self.plan.weights).name if self.plan.weights and system not in PEERS else "random",
        )
