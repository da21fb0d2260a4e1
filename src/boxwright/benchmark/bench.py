"""Shared setup of the benchmarks of a recipe: device, dataset, batches and the detectors to compare."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from boxwright.benchmark.inputs import make_batches, open_dataset, random_proposals
from boxwright.benchmark.peer_process import PEERS, PeerProcess, find_serve_script
from boxwright.benchmark.plan import Plan, require_file, resolve_precision
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
    """One recipe, ready to be measured. Use it as a context manager: the dataset is open inside the context."""

    def __init__(self, plan: Plan) -> None:
        """Resolve the recipe, the device and the peer of a plan.

        Raises:
            ValueError: the weights file, the GPU, the peer or the peer's interpreter does not exist.
        """
        require_file(plan.weights, "weights file")
        self.plan = plan
        self.experiment = plan.experiment()
        self.device = check_device(plan.device)
        self.experiment = replace(self.experiment, precision=resolve_precision(self.device, self.experiment.precision))
        self.peer_precision: Precision = resolve_precision(
            self.device, plan.peer_precision or self.experiment.precision
        )
        self._check_peer()
        self._batches: dict[bool, list[Batch]] = {}
        self.peer_versions: dict[str, str] = {}
        """Versions of the peer and its libraries, set when a peer process has built its detector."""

    def _check_peer(self) -> None:
        """Check the options of the peer before anything is measured."""
        plan = self.plan
        if not plan.peer:
            if plan.peer_python or plan.peer_precision:
                raise ValueError("--peer-python and --peer-precision need a peer. Name it with --against.")
            return
        if plan.peer not in ("torchvision", *PEERS):
            raise ValueError(f"--against: there is no peer {plan.peer!r}{nearest(plan.peer, ('torchvision', *PEERS))}")
        if (plan.peer == "torchvision") == bool(plan.peer_python):
            raise ValueError(
                "--against torchvision runs in this process. Remove --peer-python."
                if plan.peer_python
                else f"--against {plan.peer}: set --peer-python to an interpreter that has {plan.peer} installed."
            )
        family_of(self.experiment.model)
        if plan.peer_python:
            find_serve_script()

    def __enter__(self) -> Bench:
        self._stack = ExitStack()
        if self.plan.threads is not None:
            self._stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.plan.threads)
        self.dataset: Dataset = self._stack.enter_context(open_dataset(self.plan))
        with torch.device("meta"):
            detector = as_detector(build(self.experiment.model, num_classes=len(self.dataset.categories)))
        self.masks = detector.needs_masks
        self.proposals: ProposalFile | None = None
        if detector.needs_proposals:
            self.proposals = self._stack.enter_context(random_proposals(self.dataset, self.experiment))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def batches(self, *, training: bool) -> list[Batch]:
        """The `NUM_BATCHES` batches in memory, built at the first call."""
        if training not in self._batches:
            self._batches[training] = list(
                make_batches(
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
        """Build a system on the device, set up for training or for inference.

        Args:
            name: "boxwright" or the name of a peer.
            training: True for training steps, False for inference.
            compiled: whether Boxwright's training step is compiled; None follows the recipe. Peers ignore it.

        Raises:
            ValueError: the peer has no equivalent of the model, or its process cannot be started.
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
        """The recipe, settings and conditions under which `system` is measured."""
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
            dataset=Path(self.plan.data).resolve().name if self.plan.data else "generated",
            weights=Path(self.plan.weights).name if self.plan.weights and system not in PEERS else "random",
        )
