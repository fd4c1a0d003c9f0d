"""One experiment: compose → validate → build → train → evaluate → record.

python run_exp.py model=llama dataset=meta_math peft=lora peft.lora_r=8 rho=flat rho.sigma=0.05 seed=42
"""

from __future__ import annotations

import itertools
import logging
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

import data
import eval as benchmarks
from data import cache, images, text_to_image, tokens
from eval.backends.clip import CLIPBackend
from eval.backends.diffusion import DiffusionBackend
from eval.backends.hf import HFBackend
from eval.command import evaluate, print_score
from flatlora import methods
from flatlora.config.experiment import Experiment, keys_of_validation, parse
from flatlora.config.settings import Section
from flatlora.experiment import commandline
from flatlora.fused import acceleration
from flatlora.inputs import captioned
from flatlora.inputs.images import collate_images
from flatlora.inputs.rows import fingerprint, gather, jsonl
from flatlora.methods.adapters.lora import find_targets
from flatlora.models import fit, hashes, loading, sources
from flatlora.models.clip import CLASSES_FILE
from flatlora.models.latents import collate_latents
from flatlora.models.starts import start_of_checkpoint
from flatlora.runs import environment, metrics_log, run_folder
from flatlora.runs.metrics_log import MetricsLog, Tracker
from flatlora.runs.run_folder import RunFolder
from flatlora.train import checkpoint, distributed, training
from flatlora.train.preemption import Preempted
from flatlora.train.recorder import best_fault
from flatlora.utils import console, files, records
from flatlora.utils.errors import ConfigError
from flatlora.utils.precision import Precision, choose_precision

logger = logging.getLogger(__name__)

CONF_DIR = Path(__file__).parent / "conf"
EXIT_FAILED, EXIT_CONFIG, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130  # 75: try again later (sysexits.h)


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a run failed, 2 a fault of the configuration, 75 preempted, 130 interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    console.quiet_libraries()
    try:
        words = [word for word in words if not word.startswith("--local_rank")]  # deepspeed's launcher adds it
        flags, words = commandline.split_flags(words)
        (flags, own), (settings, notes) = gather(
            lambda: commandline.read_flags(flags), lambda: commandline.rewrite(words)
        )
        if "--hydra-help" in flags:
            print(commandline.FLAGS_HELP)
            return 0
        sweep, settings = "--multirun" in flags, [*own, *settings]
        if sweep:
            settings, more_notes = commandline.name_jobs(settings)
            notes += more_notes
        for note in notes:
            console.console.print(f"rewritten: {note}", markup=False, soft_wrap=True)
        if flags and not sweep:
            return _hand_to_hydra(flags, settings)  # --help, --cfg job and the like
        jobs = commandline.expand_sweep(settings) if sweep else [settings]
        experiments = experiments_of(jobs)
        if sweep and not all(experiment.dry_run for experiment in experiments):
            return run_sweep(flags, settings, experiments)
        return max(run(experiment, job) for experiment, job in zip(experiments, jobs, strict=True))
    except ConfigError as error:
        if distributed.is_main_process():
            console.report_faults(error)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        console.console.print("Interrupted before the run began: nothing was written.")
        return EXIT_INTERRUPTED
    except OSError as error:  # of a cache or the run's folder, such as a disk that is full or became read-only
        console.report_failure(error)
        return EXIT_FAILED


def run_sweep(flags: Sequence[str], settings: Sequence[str], experiments: Sequence[Experiment]) -> int:
    """Let Hydra launch the jobs, then show what became of each. One that fails does not stop the others.

    Raises:
        ConfigError: some job's folder is not free for it; none has been started.
    """
    folders = [RunFolder.of(experiment) for experiment in experiments]
    faults, before = [], []
    for experiment, folder in zip(experiments, folders, strict=True):
        try:
            before.append((folder.is_finished(experiment), folder.record))
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    for folder, (finished, _) in zip(folders, before, strict=True):
        if not finished and distributed.is_main_process():
            folder.check_writable()  # Hydra makes folders there before any job does; the first fault stands for all
    try:
        _hand_to_hydra(flags, settings)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
        console.console.print("Sweep interrupted: the same command with resume=true does what is left.")
    if not distributed.is_main_process():
        return 0  # what became of the jobs is the main process's to say
    states, jobs = [], []
    for folder, (finished, old) in zip(folders, before, strict=True):
        try:
            record = folder.record
        except ConfigError as error:  # one that was broken meanwhile hides no other
            console.report_faults(error)
            states.append("broken record")
            jobs.append((states[-1], folder.path, None))
            continue
        told = record is not None and (finished or record != old)  # an old record says nothing of this job
        states.append(record["status"] if told else "not run")
        jobs.append((states[-1], folder.path, record if told else None))
    console.print_sweep(f"Sweep: {states.count('finished')} of {len(folders)} finished", jobs)
    if interrupted:
        return EXIT_INTERRUPTED
    return 0 if set(states) == {"finished"} else EXIT_FAILED


def experiment_of(settings: Sequence[str]) -> Experiment:
    """Typed experiment of canonical command-line settings.

    Raises:
        ConfigError: as `parse`; or epochs in a word where max_steps ends the run. Options of conf have epochs of their
            own, which words may well cut short.
    """
    experiment = parse(commandline.compose_config(CONF_DIR, settings), REGISTRY)
    steps = experiment.trainer.max_steps
    if steps is not None and any(word.lstrip("+").startswith("optim.epochs=") for word in settings):
        fault = (
            f"Invalid optim.epochs={experiment.optim.epochs:g} with trainer.max_steps={steps}: the run ends after "
            "max_steps, however many epochs that is; leave one of them out, or set trainer.max_steps=null."
        )
        raise ConfigError([fault])
    return experiment


def experiments_of(jobs: Sequence[Sequence[str]]) -> list[Experiment]:
    """`experiment_of` of each job of a sweep; every fault of every job, before the first one starts."""
    experiments, faults = [], []
    for job in jobs:
        try:
            experiments.append(experiment_of(job))
        except ConfigError as error:
            faults += error.faults
    folders = [RunFolder.of(experiment).path for experiment in experiments]
    faults += [
        f"Two jobs of the sweep would write to {folder}: drop the value that is swept twice, or let wandb.name or seed "
        "differ."
        for folder in sorted({folder for folder in folders if folders.count(folder) > 1})
    ]
    if faults:
        raise ConfigError(faults)
    return experiments


class OptionRegistry:
    """What loaders, methods and benchmarks bring along; see `flatlora.config.experiment.Registry`."""

    def section_class(self, section: str, raw: Mapping[str, Any]) -> type[Section] | str:
        try:
            if section == "dataset":
                return data.loader(str(raw.get("loader"))).Config
            if section == "peft":
                return methods.method(str(raw.get("method"))).Config
            if section == "rho":
                return methods.rho(str(raw.get("method"))).Config
            return benchmarks.evaluator(section.removeprefix("eval.")).Config
        except KeyError as error:
            return error.args[0]

    def owners(self, section: str, key: str) -> list[str]:
        return methods.owners(section, key)

    def refusals(self, experiment: Experiment) -> list[tuple[tuple[str, ...], str]]:
        return [*methods.combination_faults(experiment), *_eval_faults(experiment)]


def _eval_faults(experiment: Experiment) -> Iterable[tuple[tuple[str, ...], str]]:
    task, scored = getattr(experiment.dataset, "task", None), experiment.eval.get("glue")
    if scored is not None and task is not None and scored.task != task:
        yield (
            ("dataset.task", "eval.glue.task"),
            f"Invalid eval.glue.task={scored.task} with dataset={experiment.dataset.name}: its metrics are those of "
            f"{task}; leave the key out.",
        )
    for name in experiment.eval:
        kind = benchmarks.evaluator(name).KIND
        if kind != experiment.dataset.kind:
            yield (
                ("dataset.kind", f"eval.{name}"),
                f"Invalid eval=[{name}] with dataset={experiment.dataset.name} ({experiment.dataset.kind}): it scores "
                f"{kind} data sets; leave it out of eval=[...], or change the data set.",
            )


REGISTRY = OptionRegistry()


def run(experiment: Experiment, settings: Sequence[str]) -> int:
    """Run one validated experiment, or show it for a dry run; returns the exit code.

    Args:
        settings: the words that the experiment was made of, for processes that this one starts.

    Raises:
        ConfigError: data, model or folder do not fit the experiment; no weight was loaded and nothing written.
    """
    if experiment.dry_run:
        console.print_pairs("Dry run: nothing is loaded or written", describe(experiment))
        return 0
    if distributed.must_launch(experiment.trainer):
        return distributed.launch(experiment.trainer, Path(__file__), settings)
    distributed.check_launch(experiment)
    device = loading.choose_device(experiment.trainer.device)
    distributed.initialise(experiment, device)
    distributed.check_agreement(
        {
            "the configuration": experiment.sha256(),
            "the project's code": distributed.code_sha256(),
            "the dtype of matrix products": str(_precision(experiment).products),
        },
        "Start every node with the same command and the same checkout, on CPUs of one kind.",
    )
    folder = RunFolder.of(experiment)
    if distributed.from_main_process(lambda: folder.is_finished(experiment)):
        console.console.print(
            f"{folder.path} is finished already; overwrite=true runs it anew.", markup=False, soft_wrap=True
        )
        return 0
    inputs = prepare(experiment, device)
    distributed.check_agreement(
        {"the training data": inputs.data_sha256}, "Give every node the same files, or pin dataset.revision."
    )

    base = distributed.from_main_process(lambda: loading.backbone_state(experiment.model))

    def claim() -> Path | None:
        """The checkpoint to go on from. Whatever refuses the folder does so before anything in it is changed."""
        folder.open(experiment)
        newest = None
        if not experiment.overwrite:
            origin = experiment.sha256(), inputs.data_sha256, distributed.world_size(), experiment.trainer.zero
            newest = checkpoint.latest_good(folder.path, *origin, base=base, also=best_fault)
            if newest is None and folder.is_trained:
                raise ConfigError([_nothing_to_score_from(folder, experiment)])
            if newest is not None:
                start_of_checkpoint(newest)  # a start that was damaged is no start
        folder.begin(experiment)
        checkpoint.remove_newer(folder.path, newest)
        return newest

    try:
        return execute(experiment, folder, inputs, distributed.from_main_process(claim), base)
    finally:
        folder.close()


def _nothing_to_score_from(folder: RunFolder, experiment: Experiment) -> str:
    names = [f"python -m eval.{name} {folder.path}" for name in experiment.eval]
    damage = folder.damage()
    whole = not any(name.startswith("adapter/") for name in damage)
    remedy = f"score its adapter with {', '.join(names)}, or say overwrite=true" if names else "say overwrite=true"
    told = f" ({'; '.join(damage)})" if damage else ""
    gone = "its checkpoints are damaged" if checkpoint.checkpoints(folder.path) else "its checkpoints are gone"
    return (
        f"{folder.path} is finished{told} and {gone}, so resume=true would train it anew: "
        f"{remedy if whole else 'say overwrite=true'}."
    )


@dataclass(frozen=True)
class Inputs:
    """All that a run reads besides weights."""

    device: torch.device
    processor: training.Processor  # a tokenizer, an image processor, or none
    rows: tokens.Prepared | images.PreparedImages | text_to_image.PreparedCaptioned
    asked: dict[str, Sequence[Any]]  # rows of each benchmark
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    data_sha256: str  # of all that training and validation read


def prepare(experiment: Experiment, device: torch.device) -> Inputs:
    """Make the rows ready and try the method on the model's skeleton; no weight is loaded.

    Raises:
        ConfigError: model, method, data and benchmarks, or then the rows that are asked, do not fit; nothing has been
            written.
    """
    kind = experiment.dataset.kind
    _warn_of_unread_data_root(experiment)
    skeleton, (processor, rows), _, own = gather(
        lambda: _check_model(experiment, device),
        lambda: _read(experiment),
        lambda: _check_benchmarks(experiment),
        lambda: _own_rows(experiment),
    )
    if kind == "captioned":
        loading.tell_long_prompts(experiment.model, _prompts(experiment, rows))
    known = {
        "image": lambda: {"classes": rows.classes.names},
        "text": lambda: {"tokenizer": processor},
        "captioned": lambda: {"model": experiment.model},
    }[kind]()
    names = [name for name in experiment.eval if name not in own]
    _, _, *found = gather(
        lambda: _check_validation(experiment, len(rows.validation)),
        lambda: _check_tokens(experiment, skeleton, processor, rows),
        *(lambda name=name: _test_rows(experiment, rows.test, name, known) for name in names),
    )
    asked = own | dict(zip(names, found, strict=True))
    collate = _COLLATORS[kind](experiment.model, processor)
    return Inputs(device, processor, rows, asked, collate, rows.sha256)


def _warn_of_unread_data_root(experiment: Experiment) -> None:
    """No fault: one command may sweep over data sets that read files and such as are made."""
    section = experiment.dataset
    own = any(getattr(benchmarks.evaluator(name), "OWN_ROWS", False) for name in experiment.eval)
    if experiment.data_root is None or own or data.loader(section.loader).sources(section):
        return
    if distributed.is_main_process():
        logger.warning(
            "Nothing reads data_root=%s: dataset=%s takes no files from it.", experiment.data_root, section.name
        )


def _check_model(experiment: Experiment, device: torch.device) -> nn.Module:
    """The architecture without weights, which has what the experiment asks for."""
    skeleton = loading.skeleton(experiment.model)
    gather(
        lambda: methods.method(experiment.peft.method).check(skeleton, experiment.peft),
        lambda: loading.check_weights(experiment.model, device),
        lambda: _refuse(fit.attention_faults(experiment.model, skeleton)),
        lambda: _refuse(
            fit.packing_faults(experiment.model, skeleton, reads_weights=_reads_weights(experiment)),
        ),
        lambda: _refuse(_position_faults(experiment, skeleton)),
    )
    _refuse(_peft_faults(experiment, skeleton))
    return skeleton


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise ConfigError(faults)


def _reads_weights(experiment: Experiment) -> str | None:
    """The setting that reads, moves or trains W itself; None where a run only multiplies by it."""
    if methods.method(experiment.peft.method).needs_dense:
        return f"peft={experiment.peft.name}"
    if experiment.flat and experiment.rho.mode in ("copy", "inplace"):
        return f"rho.mode={experiment.rho.mode}"
    return f"rho={experiment.rho.name}" if experiment.regularised else None


def _position_faults(experiment: Experiment, skeleton: nn.Module) -> list[str]:
    longest = getattr(experiment.dataset, "max_length", None)
    return [] if longest is None else fit.position_faults(experiment.model, skeleton, longest)


def _peft_faults(experiment: Experiment, skeleton: nn.Module) -> list[str]:
    """What PEFT says against an adapter around the experiment's layers, tried on a skeleton that it changes."""
    wanted = getattr(experiment.peft, "target_modules", None)
    if wanted is None:
        return []
    targets = find_targets(skeleton, wanted)
    try:
        get_peft_model(skeleton, LoraConfig(r=1, target_modules=targets))
    except ValueError as error:
        return [f"Invalid peft.target_modules={wanted} with {experiment.model.hub_id}: {error}"]
    return []


def _check_tokens(experiment: Experiment, skeleton: nn.Module, processor: Any, rows: Any) -> None:
    """See that every token of the rows, and those that batches are padded with, has an embedding.

    Warns of rows beyond the positions that the model was made for.

    Raises:
        ConfigError: some have none.
    """
    if experiment.dataset.kind != "text":
        return
    name, parts = experiment.model.hub_id, (rows.train, rows.validation)
    faults = fit.vocabulary_faults(processor, skeleton, name)
    largest = max((int(part.ids.max()) for part in parts if len(part.ids)), default=0)
    known = fit.embedding_rows(skeleton)
    if largest >= known and not faults:
        token = processor.convert_ids_to_tokens(largest)
        faults.append(
            f"Invalid tokenizer of {name}: rows of {experiment.dataset.name} hold {token} ({largest}), and the model "
            f"has {known} embeddings; give the folder the tokenizer that the model was trained with."
        )
    _refuse(faults)
    lengths = itertools.chain.from_iterable(part.lengths for part in parts)
    if (warning := fit.long_rows_warning(experiment.model, skeleton, lengths)) and distributed.is_main_process():
        logger.warning("%s", warning)


def _read(experiment: Experiment) -> tuple[Any, Any]:
    """What turns rows into tensors, and the rows; where the one cannot be had, the files of the others are looked for.

    Raises:
        ConfigError: processor or data are not there, or do not fit.
    """
    kind = experiment.dataset.kind
    try:
        processor = _PROCESSORS[kind](experiment.model)
    except ConfigError as error:
        raise ConfigError([*error.faults, *_file_faults(experiment)]) from error
    return processor, distributed.main_process_first(lambda: _READERS[kind](experiment, processor))


def _file_faults(experiment: Experiment) -> list[str]:
    """Files of the data set that are not there, or a hub out of reach."""
    known = data.loader(experiment.dataset.loader).sources(experiment.dataset)
    try:
        gather(*(lambda source=source: fingerprint(source, experiment.data_root) for source in known))
    except ConfigError as error:
        return error.faults
    return []


def _prompts(experiment: Experiment, rows: text_to_image.PreparedCaptioned) -> list[str]:
    """All that the model is trained with."""
    found = [part.prompt(row) for part in (rows.test, rows.validation) for row in range(len(part))]
    return [*found, *filter(None, [experiment.dataset.class_prompt])]


def _check_validation(experiment: Experiment, left: int) -> None:
    """Rows that repeat train rows do not validate, which may leave none."""
    if not left and (keys := keys_of_validation(experiment.optim)):
        given = ", ".join(f"optim.{key}={getattr(experiment.optim, key)}" for key in keys)
        raise ConfigError(
            [
                f"Invalid {given}: no validation row is left of {experiment.dataset.name}, for all stand among its "
                "train rows; take fewer train rows, or leave the keys out."
            ]
        )


def _check_benchmarks(experiment: Experiment) -> None:
    found = [(benchmarks.evaluator(name), config) for name, config in experiment.eval.items()]
    gather(
        *(
            lambda module=module, config=config: module.check_settings(config, experiment.model)
            for module, config in found
            if hasattr(module, "check_settings")
        )
    )


def _own_rows(experiment: Experiment) -> dict[str, Sequence[Any]]:
    """Rows of the benchmarks that ask their own, whatever the data set is."""
    names = [name for name in experiment.eval if getattr(benchmarks.evaluator(name), "OWN_ROWS", False)]
    rows = gather(*(lambda name=name: _test_rows(experiment, [], name, {}) for name in names))
    return dict(zip(names, rows, strict=True))


def _test_rows(experiment: Experiment, test: Sequence[Any], name: str, known: Mapping[str, Any]) -> Sequence[Any]:
    """What a benchmark asks at the end of a run.

    Args:
        test: the data set's test rows.
        known: of the model, for `check_rows`.

    Raises:
        ConfigError: they are not there, or cannot be scored.
    """
    module, config = benchmarks.evaluator(name), experiment.eval[name]
    template = getattr(config, "template", None)
    if module.KIND == "text" and (module.OWN_ROWS or not test):
        rows, source = module.benchmark_rows(experiment.data_root, config), f"{name}'s own rows"
    elif template not in (None, getattr(experiment.dataset, "template", template)):
        raise ConfigError(
            [
                f"Invalid eval.{name}.template={template} with dataset={experiment.dataset.name}: its test rows are "
                f"asked, in dataset.template={experiment.dataset.template}; leave the key out."
            ]
        )
    else:
        rows, source = test, f"dataset {experiment.dataset.name}, test rows"
    module.check_rows(rows, source, config, **known)
    return rows


def read_text(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> tokens.Prepared:
    """Token ids of a text data set."""
    counting = getattr(experiment.dataset, "limit_tokenizer", None)
    counting = loading.load_tokenizer(experiment.model.counting_with(counting)) if counting else None
    encoder_decoder = experiment.model.family == "seq2seq"
    return cache.prepared(
        experiment.dataset, experiment.data_root, tokenizer, counting, encoder_decoder=encoder_decoder
    )


def read_images(experiment: Experiment, processor: Any) -> images.PreparedImages:
    """Pictures of an image data set."""
    return images.prepared(experiment.dataset, experiment.data_root, processor)


def read_captioned(experiment: Experiment, processor: None) -> text_to_image.PreparedCaptioned:
    """Pictures with prompts, of sizes that the model takes, as many as a batch has.

    Raises:
        ConfigError: every fault of them.
    """
    rows = text_to_image.prepared(experiment.dataset, experiment.data_root)
    batch, count = experiment.optim.batch_size, len(rows.train)
    drawn = isinstance(rows.prior, text_to_image.ClassPictures)  # in that size
    faults = loading.size_faults(experiment.model, rows.train.sizes, drawn=drawn)
    if count < batch:
        faults.append(
            f"Invalid optim.batch_size={batch} with dataset={experiment.dataset.name}: it has {count} pictures to "
            "train on, fewer than a batch; lower optim.batch_size, or set dataset.repeats."
        )
    if faults:
        raise ConfigError(faults)
    return rows


# By kind of data set: what makes its rows ready, and the micro-batches of them.
_PROCESSORS = {"text": loading.load_tokenizer, "image": loading.load_image_processor, "captioned": lambda model: None}
_READERS = {"text": read_text, "image": read_images, "captioned": read_captioned}
_COLLATORS = {
    "text": lambda model, tokenizer: tokens.collator(model.family, tokenizer.pad_token_id),
    "image": lambda model, processor: collate_images,
    "captioned": lambda model, processor: collate_latents,
}


def execute(experiment: Experiment, folder: RunFolder, inputs: Inputs, resume_from: Path | None, base: str) -> int:
    """Train, evaluate and record; whatever happens is in run.json. Returns the exit code.

    Args:
        base: state of the backbone's weights, as `loading.backbone_state` has it.
    """
    environment.reset_peak_memory()
    for polite in (
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # recorded as interrupted; while it trains, see flatlora.train.preemption
        signal.signal(polite, signal.default_int_handler)
    record, code, hand_on = _new_record(experiment) | {"base": base}, 0, None
    try:
        train_and_score(experiment, folder, inputs, resume_from, record)
    except KeyboardInterrupt:
        record["status"], code = "interrupted", EXIT_INTERRUPTED
        console.console.print("Interrupted: the same command with resume=true goes on from the newest checkpoint.")
    except Preempted as error:
        record["status"], code, hand_on = "interrupted", EXIT_PREEMPTED, error.hand_on
        console.console.print("Told to end: a checkpoint is written, and the same command with resume=true goes on.")
    except ConfigError as error:  # found only with the weights at hand
        record |= {"status": "failed", "error": str(error)}
        code = EXIT_CONFIG
        console.console.print(f"The run failed: {error}", markup=False, soft_wrap=True)
    except Exception as error:
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        code = EXIT_FAILED
        if not isinstance(error, OSError) and files.out_of_space(error, folder.path):
            error = OSError(f"no space left for {folder.path} ({error}); free some, then go on with resume=true")
        console.report_failure(error)
    record["memory"] = environment.peak_memory_gib()
    if distributed.is_main_process():
        try:
            records.write_signed(folder.path / "run.json", record)
            if code == 0:
                hashes = record["backbone_sha256"]
                unchanged = "unchanged" if hashes["before"] == hashes["after"] else "CHANGED"
                told = "all weights trained" if hashes["before"] is None else f"backbone {unchanged}"
                console.console.print(f"Finished: {folder.path} ({told})", markup=False, soft_wrap=True)
        except OSError as error:  # a full disk: what was there stays, and the run can be resumed
            console.report_failure(error)
            code = EXIT_FAILED
    if hand_on is not None:
        hand_on()
    return code


def train_and_score(
    experiment: Experiment, folder: RunFolder, inputs: Inputs, resume_from: Path | None, record: dict[str, Any]
) -> None:
    """The run itself; fills `record` as it goes."""
    classes = getattr(inputs.rows, "classes", None)
    if distributed.is_main_process():  # what scores the run later reads all this
        if experiment.dataset.kind == "text":
            files.write_atomic(folder.path / "test.jsonl", jsonl(inputs.rows.test))
        if classes is not None:
            files.write_json(folder.path / CLASSES_FILE, classes._asdict())
        if experiment.dataset.kind == "captioned":
            files.write_json(folder.path / captioned.PICTURES_FILE, captioned.identities(inputs.rows.test))
    inputs = encode(experiment, inputs, record["base"])
    precision = choose_precision(experiment.trainer.autocast, experiment.model.dtype, inputs.device)
    record["precision"] = precision.record()
    if distributed.is_main_process():
        console.console.print(f"precision: {precision}", markup=False, soft_wrap=True)
    backbone = loading.load_backbone(experiment.model, inputs.device, classes, experiment.trainer.autocast)
    method, start = methods.method(experiment.peft.method), _start(experiment, folder, inputs, resume_from)
    model = method.apply(backbone, experiment.peft, start)
    if experiment.regularised:
        methods.rho(experiment.rho.method).prepare(model, experiment.rho, experiment.seed)
    if experiment.trainer.kernels == "auto":
        record["kernels"] = acceleration.accelerate(model, inputs.device)
    record["data_sha256"] = inputs.data_sha256
    record["params"] = loading.parameter_counts(model)
    record["backbone_sha256"]["before"] = hashes.backbone_sha256(model)
    distributed.check_agreement(
        {
            "the backbone": record["backbone_sha256"]["before"],
            "the adapter's start": hashes.trainable_sha256(model),
        },
        "Give every node the same weights, or pin model.revision.",
    )
    with metrics_log.tracking(experiment, folder.path, record["metrics"]) as tracker:
        outcome = training.train(
            experiment,
            model,
            inputs.processor,
            inputs.rows.train,
            inputs.rows.validation,
            inputs.collate,
            folder,
            data_sha256=record["data_sha256"],
            base=record["base"],
            log=MetricsLog(folder.path / "metrics.jsonl", tracker),
            resume_from=resume_from,
            progress=console.ProgressBar(f"train {experiment.run_name()}") if distributed.is_main_process() else None,
        )
        record["backbone_sha256"]["after"] = hashes.backbone_sha256(model)
        record["adapter_sha256"] = hashes.trainable_sha256(model)
        record |= {"timing": outcome.timing, "perturbation": outcome.perturbation, "resumed_from": outcome.resumed_from}
        record["distributed"] = {
            "processes": distributed.world_size(),
            "zero": experiment.trainer.zero,
            "dtypes": outcome.dtypes,
        }
        record["metrics"].update(outcome.metrics)
        training.check_invariants(experiment, model, record["backbone_sha256"])
        if distributed.is_main_process():
            with files.write_folder(folder.adapter) as staging:
                method.save(model, experiment.peft, staging, start)
                if inputs.processor is not None:
                    inputs.processor.save_pretrained(staging)
                loading.complete_adapter(experiment.model, staging)
            record["metrics"].update(score(experiment, model, inputs, folder, record["base"], tracker))
            record["weights_sha256"] = hashes.weights_sha256(folder.adapter)
            record[records.FILES] = records.hash_files(folder.path)
    record["status"] = "finished"


def encode(experiment: Experiment, inputs: Inputs, base: str) -> Inputs:
    """Inputs whose rows are what the model reads; pictures with prompts are encoded before it is loaded.

    Args:
        base: state of the backbone's weights.
    """
    if experiment.dataset.kind != "captioned":
        return inputs

    def encoded() -> text_to_image.PreparedCaptioned:
        source = sources.backbone_source(experiment.model)
        return text_to_image.encode(
            inputs.rows, experiment.dataset, experiment.model, source, inputs.device, state=base, seed=experiment.seed
        )

    return replace(inputs, rows=distributed.main_process_first(encoded))


def _start(experiment: Experiment, folder: RunFolder, inputs: Inputs, resume_from: Path | None) -> methods.Start:
    return methods.Start(
        experiment.seed,
        folder.path / "start",
        training.calibration_batches(experiment, inputs.rows.train, inputs.collate, inputs.device),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        resumed=resume_from is not None,
    )


def score(
    experiment: Experiment, model: nn.Module, inputs: Inputs, folder: RunFolder, base: str, tracker: Tracker | None
) -> dict[str, Any]:
    """Every benchmark of `eval=[...]` on the data set's test rows: {"<benchmark>/<metric>": value}."""
    metrics = {}
    classes = getattr(inputs.rows, "classes", None)
    identity = loading.weights_identity(str(folder.adapter), experiment.model, classes, base) if experiment.eval else {}
    backend_class = _BACKENDS[experiment.dataset.kind]
    for name, config in experiment.eval.items():
        backend = backend_class(
            model,
            inputs.processor,
            batch_size=config.batch_size,
            precision=choose_precision(experiment.trainer.autocast, experiment.model.dtype, inputs.device),
            identity=identity,
            **_of_backend(experiment),
        )
        with run_folder.answering(folder.path / "eval" / name, wait=True):
            result = evaluate(name, backend, inputs.asked[name], folder.path / "eval" / name, config)
        print_score(name, result)
        picture = folder.path / "eval" / name / getattr(benchmarks.evaluator(name), "PICTURE", "")
        if tracker is not None and picture.is_file():
            tracker.show(f"{name}/pictures", picture)
        metrics |= {f"{name}/{metric}": value for metric, value in result["metrics"].items()}
    return metrics


_BACKENDS = {"text": HFBackend, "image": CLIPBackend, "captioned": DiffusionBackend}


def _of_backend(experiment: Experiment) -> dict[str, Any]:
    """What a backend needs besides the trained model: the parts of a pipeline that were let go of."""
    if experiment.dataset.kind != "captioned":
        return {}
    return {"config": experiment.model, "source": sources.backbone_source(experiment.model)}


def describe(experiment: Experiment) -> list[tuple[str, str]]:
    """What a run would do and load, for a dry run."""
    loader, optim = data.loader(experiment.dataset.loader), experiment.optim
    source = f" from {experiment.data_root or 'hub'}" if loader.sources(experiment.dataset) else ""  # else generated
    return [
        ("run folder", str(RunFolder.of(experiment).path)),
        ("model", sources.describe_source(experiment.model)),
        ("dataset", f"{experiment.dataset.name}: {loader.describe(experiment.dataset)}{source}"),
        ("peft", _settings(experiment.peft)),
        ("rho", _settings(experiment.rho) if experiment.regularised else "off: no perturbation"),
        ("optim", _settings(optim)),
        ("trainer", _settings(experiment.trainer)),
        ("precision", str(_precision(experiment))),
        ("eval", ", ".join(f"{name} ({_settings(config)})" for name, config in experiment.eval.items()) or "none"),
        ("seed", str(experiment.seed)),
        ("config", f"sha256 {experiment.sha256()}"),
    ]


def _precision(experiment: Experiment) -> Precision:
    """How a run on this machine would compute; of a GPU that is asked for and is not here, too."""
    on_gpu = experiment.trainer.device == "cuda" or (experiment.trainer.device == "auto" and torch.cuda.is_available())
    return choose_precision(experiment.trainer.autocast, experiment.model.dtype, "cuda" if on_gpu else "cpu")


def _settings(section: Section) -> str:
    return " ".join(f"{key}={value}" for key, value in section.model_dump(mode="json").items() if value is not None)


def _new_record(experiment: Experiment) -> dict[str, Any]:
    return {
        "status": "failed",
        "experiment": experiment.model_dump(mode="json"),
        "seed": experiment.seed,
        "config_sha256": experiment.sha256(),
        "data_sha256": None,
        "base": None,
        "git_sha": environment.git_sha(),
        "env": environment.environment(),
        "backbone_sha256": {"before": None, "after": None},
        "adapter_sha256": None,
        "params": None,
        "precision": None,
        "kernels": [],
        "metrics": {},
        "timing": None,
        "perturbation": None,
        "resumed_from": None,
        "distributed": None,
        "memory": None,
    }


def _hand_to_hydra(flags: Sequence[str], settings: Sequence[str]) -> int:
    sys.argv = [sys.argv[0], *flags, *commandline.lenient(settings)]
    _exit_codes.clear()
    if any(flag.startswith("--info") for flag in flags):  # told through the root logger, by a handler of Hydra's own
        logging.getLogger().handlers.clear()
    with commandline.hydra_errors():
        _hydra_job()
    return max(_exit_codes, default=0)


_exit_codes: list[int] = []  # of the jobs that ran in this process: Hydra drops what a job returns


@hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
def _hydra_job(config: DictConfig) -> int:
    try:
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN:
            commandline.mask_record(Path(hydra_config.sweep.dir))
        if hydra_config.runtime.choices.get("hydra/launcher") in ("joblib", "ray"):  # several workers on one machine
            distributed.claim_gpu(distributed.gpu_count())
        settings = list(hydra_config.overrides.task)
        code = run(parse(OmegaConf.to_container(config, resolve=True), REGISTRY), settings)
    except ConfigError as error:
        console.report_faults(error)
        code = EXIT_CONFIG
    if code in (EXIT_INTERRUPTED, EXIT_PREEMPTED):
        raise KeyboardInterrupt  # the jobs after this one are not wanted either
    _exit_codes.append(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
