"""Command-line words: published spellings, sweeps, composition of every option file, exit codes of the entry point."""

import re
import shlex
import shutil
import time

import numpy as np
import pytest

import run_exp
from flatlora.experiment import commandline
from flatlora.experiment.old_names import OLD_EXPERIMENTS
from flatlora.utils.errors import ConfigError

PUBLISHED = shlex.split(
    "++dataset_name=meta_math +peft=all model=llama ++seed=42 +peft.lora_r=8 wandb.project=P wandb.name=vanilla_lora"
)
OPTIONS = sorted(
    (path.parent.relative_to(run_exp.SUITE.conf_dir).as_posix(), path.stem)
    for group in commandline.GROUPS
    if group != "experiment"  # tests/test_experiments.py: they want a data set
    for path in (run_exp.SUITE.conf_dir / group).glob("*.yaml")
)


def experiment(*words: str):
    return run_exp.experiment_of(commandline.rewrite(words)[0])


def errors(function, *arguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return caught.value.errors


@pytest.mark.parametrize(
    ("word", "canonical"),
    [
        ("++rho=0.05", ["rho=flat", "rho.sigma=0.05"]),
        ("+rho=0.05", ["rho=flat", "rho.sigma=0.05"]),
        ("rho=0.05", ["rho=flat", "rho.sigma=0.05"]),
        ("rho=1", ["rho=flat", "rho.sigma=1"]),
        ("++rho=1e-2", ["rho=flat", "rho.sigma=1e-2"]),
        ("++rho=-0.05", ["rho=flat", "rho.sigma=-0.05"]),  # refused later, by its range
        ("++rho=nan", ["rho=flat", "rho.sigma=nan"]),
        ("++rho=0", ["rho=off"]),
        ("++rho=0.0", ["rho=off"]),
        ("++rho=0,0.05,0.1", ["rho=flat", "rho.sigma=0,0.05,0.1"]),
        ("++rho=range(0,0.1,0.05)", ["rho=flat", "rho.sigma=range(0,0.1,0.05)"]),
        ("++rho=flat_iid", ["rho=flat_iid"]),
        ("++rho=true", ["rho=true"]),  # no number: refused later, as an unknown option
        ("+peft=all", ["peft=all"]),
        ("++peft=qv", ["peft=qv"]),
        ("+peft=lora,qv", ["peft=lora,qv"]),
        ("++dataset_name=meta_math", ["dataset=meta_math"]),
        ("+dataset_name=meta_math", ["dataset=meta_math"]),
        ("dataset_name=meta_math", ["dataset=meta_math"]),
        ("+peft.lora_r=8", ["++peft.lora_r=8"]),
        ("+trainer.max_steps=3", ["++trainer.max_steps=3"]),
        ("+eval=[gsm8k]", ["eval=[gsm8k]"]),
    ],
)
def test_a_legacy_spelling_becomes_canonical_and_stays_so(word, canonical):
    words, _ = commandline.rewrite([word])
    assert words == canonical
    assert commandline.rewrite(words) == (canonical, [])


def test_notes_name_what_was_rewritten_and_nothing_else():
    words, notes = commandline.rewrite(["-m", "model=llama", "seed=3", "++rho=0.05", "rho.sigma=0.1", "hydra.mode=RUN"])
    assert words == ["-m", "model=llama", "seed=3", "rho=flat", "rho.sigma=0.05", "rho.sigma=0.1", "hydra.mode=RUN"]
    assert notes == ["++rho=0.05 → rho=flat rho.sigma=0.05"]
    assert commandline.rewrite(["++seed=42", "~eval"]) == (["++seed=42", "~eval"], [])


@pytest.mark.parametrize(
    ("words", "canonical"),
    [
        (["experiment=table2/dora_r8"], ["experiment=table2", "peft=dora", "peft.lora_r=8"]),
        (["experiment=table1/flat_lora_r16"], ["experiment=table1", "peft.lora_r=16", "rho=flat"]),
        (
            ["experiment=table1/flat_lora_ga_r8"],
            ["experiment=table1", "peft=lora_ga", "peft.lora_r=8", "optim.lr=1e-4", "rho=flat"],
        ),
        (["experiment=table3/lora_ga"], ["experiment=table3", "peft=lora_ga"]),
        (["experiment=table4/lora_sam"], ["experiment=table4", "rho=sam"]),
        (["experiment=study/base"], ["experiment=study"]),
        (["experiment=ablation/cost"], ["experiment=cost"]),
        (["experiment=sdxl/flat_lora", "++rho=0"], ["experiment=sdxl", "rho=off"]),
        (["experiment=ablation/sam", "rho=off,nbar"], ["experiment=ablation", "rho=off,nbar"]),
        (["experiment=study/lora_pro", "optim.lr=5e-4"], ["experiment=study", "peft=lora_pro", "optim.lr=5e-4"]),
    ],
)
def test_an_old_name_of_an_experiment_is_its_table_and_its_rows_overrides(words, canonical):
    found, notes = commandline.rewrite(words)
    assert found == canonical
    assert notes[0].startswith(f"{words[0]} → {canonical[0]}")


@pytest.mark.parametrize("prefix", ["", "++"])
def test_an_old_name_of_a_model_family_is_the_new_one(prefix):
    word = f"{prefix}model.family=sdxl"
    canonical = [f"{prefix}model.family=text_to_image"]
    assert commandline.rewrite([word]) == (canonical, [f"{word} → {canonical[0]}"])
    words = ["model=sdxl_tiny", "dataset=shapes"]
    assert experiment(*words, word) == experiment(*words)


def test_a_sweep_of_old_and_new_names_of_a_model_family_is_of_one_family():
    words = ["model=sdxl_tiny", "dataset=shapes", "model.family=sdxl,text_to_image"]
    with pytest.raises(ConfigError, match=r"Two jobs of the sweep would write to .*drop the value that is"):
        run_exp.experiments_of(commandline.expand_sweep(words))


def test_an_option_file_with_an_old_name_of_a_model_family_is_read(tmp_path):
    (tmp_path / "model").mkdir()
    own = (run_exp.SUITE.conf_dir / "model/sdxl_tiny.yaml").read_text()
    assert "family: text_to_image" in own
    (tmp_path / "model/mine.yaml").write_text(own.replace("family: text_to_image", "family: sdxl"))
    found = experiment(f"hydra.searchpath=[file://{tmp_path}]", "model=mine", "dataset=shapes")
    assert found == experiment("model=sdxl_tiny", "dataset=shapes")


def test_a_sweep_of_old_names_says_what_to_type():
    (reported,) = errors(commandline.rewrite, ["-m", "experiment=study/lora,study/flat_lora", "dataset=cola"])
    assert "study/lora is experiment=study; study/flat_lora is experiment=study rho=flat." in reported
    assert len(OLD_EXPERIMENTS) == 2 * 19 + 2 * 19 + 2 + 5 + 7  # the files that there were


def test_the_published_commands_run_as_printed():
    plain = experiment(*PUBLISHED)
    assert (plain.model.name, plain.dataset.name, plain.peft.target_modules) == ("llama", "meta_math", "all")
    assert (plain.seed, plain.peft.lora_r, plain.flat) == (42, 8, False)
    assert (plain.wandb.project, plain.wandb.name) == ("P", "vanilla_lora")
    assert (plain.dataset.max_length, plain.optim.lr, plain.optim.epochs) == (1024, 5e-4, 2)

    flat = experiment(*PUBLISHED, "++rho=0.05")
    assert flat.flat
    assert flat.rho.sigma == 0.05
    assert flat.model_dump(exclude={"rho"}) == plain.model_dump(exclude={"rho"})
    assert experiment(*PUBLISHED, "++rho=0").identity() == plain.identity()


@pytest.mark.parametrize(
    ("legacy", "canonical"),
    [
        (["++rho=0.1"], ["rho=flat", "rho.sigma=0.1"]),
        (["+peft.lora_r=16", "+peft=qv"], ["peft=qv", "peft.lora_r=16"]),
        (["+trainer.max_steps=3", "++optim.lr=1e-3"], ["trainer.max_steps=3", "optim.lr=1e-3"]),
    ],
)
def test_legacy_and_canonical_words_mean_one_experiment(legacy, canonical):
    assert experiment(*legacy) == experiment(*canonical)


def test_a_published_sweep():
    words, _ = commandline.rewrite(["-m", *PUBLISHED, "++rho=0,0.05,0.1"])
    flags, settings = commandline.split_flags(words)
    with pytest.raises(ConfigError, match="Two jobs of the sweep would write to results/P_meta_math/vanilla_lora/42"):
        run_exp.experiments_of(commandline.expand_sweep(settings))
    settings, _ = commandline.name_jobs(settings)
    experiments = run_exp.experiments_of(commandline.expand_sweep(settings))
    assert flags == ["-m"]
    assert [one.run_name() for one in experiments] == ["vanilla_lora-0", "vanilla_lora-0.05", "vanilla_lora-0.1"]
    assert [one.rho.sigma for one in experiments] == [0, 0.05, 0.1]
    assert [one.flat for one in experiments] == [False, True, True]
    assert experiments[0].identity() == experiment(*PUBLISHED).identity()


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        (["seed=1"], [["seed=1"]]),
        (["seed=1,2", "model=a"], [["seed=1", "model=a"], ["seed=2", "model=a"]]),
        (["a=1,2", "b=x,y"], [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]),
        (["seed=range(1,4)"], [["seed=1"], ["seed=2"], ["seed=3"]]),
        (["++a=choice(1,2)"], [["++a=1"], ["++a=2"]]),
        (["eval=[gsm8k,mmlu]"], [["eval=[gsm8k,mmlu]"]]),  # a list is one value
        (["wandb.name='a,b'"], [["wandb.name='a,b'"]]),
        (["hydra.sweep.dir=a,b"], [["hydra.sweep.dir=a,b"]]),
        ([], [[]]),
    ],
)
def test_expand_sweep(words, jobs):
    assert commandline.expand_sweep(words) == jobs


def test_sweeps_without_a_list_of_values_are_errors():
    reported = errors(commandline.expand_sweep, ["seed=glob(*)", "optim.lr=interval(0,1)", "seed=1,2"])
    assert [message.partition(":")[0] for message in reported] == [
        "Cannot sweep over 'seed=glob(*)'",
        "Cannot sweep over 'optim.lr=interval(0,1)'",
    ]


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("seed=range(5,1)", "there is no value in it"),
        ("seed=range(0,1,0)", "list the values"),
        ("seed=range(0,1e400)", "list the values"),
        ("seed=range(1e308,-1e308,-1e-308)", "list the values"),
        ("seed=range(nan,1)", "list the values"),
        ("seed=range(0,1e9)", "1,000,000,000 jobs: 256 are one sweep"),
        (f"seed={','.join(map(str, range(257)))}", "257 jobs: 256 are one sweep"),
    ],
)
def test_sweeps_without_an_end_or_a_value_are_errors_at_once(word, reason):
    (reported,) = errors(commandline.expand_sweep, [word])
    assert reported.startswith("Cannot sweep over ")
    assert reason in reported


def test_a_sweep_parses_an_override_once(monkeypatch):
    """Hydra's own parser takes 0.3 s for a list of 400 names, and reads it anew for each job."""
    parsed, plain = [], commandline._parse_rule
    monkeypatch.setattr(
        commandline, "_parse_rule", lambda parser, text, rule: parsed.append(text) or plain(parser, text, rule)
    )
    for kept in (commandline._parse, commandline._parsed):
        kept.cache_clear()
    word = "peft.target_modules=[q_proj,k_proj,v_proj]"
    jobs = commandline.expand_sweep([word, "seed=range(0,20)", "eval=[gsm8k]", "eval.gsm8k.max_rows=4"])
    experiments = run_exp.experiments_of(jobs)
    assert [one.seed for one in experiments] == list(range(20))
    assert experiments[0].peft.target_modules == ["q_proj", "k_proj", "v_proj"]
    assert len(parsed) == len(set(parsed))
    assert 20 <= len(parsed) < 40


@pytest.mark.parametrize("text", ["\tname: x", "defaults:\n  - own\n", "a: [1"])
def test_an_option_file_that_cannot_be_read_is_an_error(text, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/own.yaml").write_text(text)
    words = [f"hydra.searchpath=['file://{tmp_path}']", "model=own"]
    (reported,) = errors(commandline.compose_config, run_exp.SUITE.conf_dir, words)
    assert reported.startswith("The configuration does not compose: ")


def test_a_variable_to_copy_that_is_not_there_is_an_error():
    (reported,) = errors(commandline.compose_config, run_exp.SUITE.conf_dir, ["hydra.job.env_copy=[NO_SUCH_VARIABLE]"])
    assert reported == "The configuration does not compose: 'NO_SUCH_VARIABLE'"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["seed=3", "rho=flat", "rho.sigma=0.1", "peft.target_modules=[q_proj,v_proj]"],
        ["model=llama", "dataset=meta_math", "protocol=flat_lora", "optim.lr=1e-3", "wandb.name='a-${rho.sigma}'"],
        ["experiment=table2", "peft=dora", "peft.lora_r=8", "eval=[gsm8k]", "eval.gsm8k.max_rows=4", "seed=7"],
        ["peft.lora_r=4", "peft.lora_r=2", "model.revision=null", "trainer={max_steps: 3}"],
        ["~peft.lora_dropout", "seed=3"],
        ["+peft.extra=1", "hydra.job.env_set.X=1"],
        ["seed.x=3"],
        ["trainer.max_steps=5", "trainer={max_steps: 3}", "seed=4"],
        ["++optim_of=lora_fa"],
        ["++protocol_of=x"],
    ],
)
def test_jobs_of_a_sweep_are_composed_as_hydra_composes_each(words, monkeypatch):
    def composed():
        try:
            return commandline.compose_config(run_exp.SUITE.conf_dir, words)
        except ConfigError as error:
            return error.errors

    with monkeypatch.context() as patch:
        patch.setattr(commandline, "_composed", lambda _, words: commandline.compose("config", overrides=list(words)))
        alone = composed()
    monkeypatch.setattr(commandline, "_bases", {})
    first = composed()
    assert [first, composed()] == [alone, alone]  # nothing of a job is left for the next


def test_jobs_are_counted_over_all_sweeps():
    (reported,) = errors(commandline.expand_sweep, ["seed=range(0,17)", "rho.sigma=range(0,16)"])
    assert "272 jobs" in reported
    assert len(commandline.expand_sweep(["seed=range(0,16)", "rho.sigma=range(0,1,0.0625)"])) == 256


@pytest.mark.parametrize("word", ["seed=range(1,3),5", "seed=range(5,1)", "seed=range(0,1e9)", "seed=range(0,1,0)"])
def test_a_sweep_that_cannot_be_is_exit_code_2(word, capsys):
    assert run_exp.main(["-m", word, "dry_run=true"]) == 2
    assert "Cannot sweep over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("seed=" + "9" * 5000, "a number has fewer than 300 digits"),
        ("optim.lr=0." + "9" * 5000, "a number has fewer than 300 digits"),
        ("a=" + "[" * 2000 + "]" * 2000, "at most 20 brackets"),
        ("a=" + "{a:" * 200 + "1" + "}" * 200, "at most 20 brackets"),
        ("peft.target_modules=[" + ",".join(f"m{i}" for i in range(20_000)) + "]", "and a setting takes 16000"),
        ("wandb.name=a\udcff", "its bytes are no UTF-8"),
    ],
)
@pytest.mark.parametrize("function", [commandline.rewrite, commandline.expand_sweep, run_exp.experiment_of])
def test_what_no_parser_should_see_is_named_at_once(function, word, reason):
    begun = time.monotonic()
    (reported,) = errors(function, [word])
    assert reason in reported
    assert len(reported) < 300
    assert time.monotonic() - begun < 2.0


def test_all_settings_together_have_a_length():
    (reported,) = errors(commandline.rewrite, [f"k{i}={'x' * 10_000}" for i in range(4)])
    assert reported.startswith("Cannot read settings of 40")


def test_long_texts_and_brackets_within_them_are_taken():
    text = "(" * 100 + "x" * 10_000
    assert commandline.compose_config(run_exp.SUITE.conf_dir, [f"dataset.prompt='{text}'"])["dataset"]["prompt"] == text


@pytest.mark.parametrize("word", ["model@dataset=smollm", "+model@peft=smollm", "peft@_global_=lora", "~model@dataset"])
def test_an_option_is_not_put_at_another_place(word):
    (reported,) = errors(commandline.rewrite, [word])
    assert reported.startswith(f"Invalid {word}: @ would put")


@pytest.mark.parametrize(
    "word",
    [
        "hydra=null",
        "hydra={}",
        "~hydra",
        "hydra.run=null",
        "hydra.job=5",
        "hydra/launcher=5",
        "hydra.sweeper=null",
        "hydra.run.dir=x",
    ],
)
def test_settings_of_hydra_that_it_cannot_take_are_errors(word, capsys):
    assert run_exp.main([word, "dry_run=true"]) == 2
    assert "1 error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word",
    [
        *(f"hydra.launcher.n_jobs={value}" for value in ("100000", "257", "0", "-257", "1e5", "null", "'\"100000\"'")),
        "++hydra.launcher.n_jobs=100000",
        "hydra.launcher.n_jobs='${oc.env:MANY}'",
        "hydra.launcher.n_jobs=2,100000",
        "hydra.launcher.tasks_per_node=-1",
        "hydra.launcher.ray.init.num_cpus=100000",
        "hydra.sweep.subdir=../../../../evil",
        "hydra.sweep.subdir=/evil",
        "hydra.sweep.subdir=a/../../evil",
        "hydra.sweep.subdir='a/${hydra.job.override_dirname}'",
        "hydra.sweep.subdir=.,../evil",
        "hydra.sweep={subdir:../evil}",
        "hydra.job.name=x/../../../evil",
        "hydra.job.name=..",
        f"hydra.job.name={'n' * 300}",
        "hydra.job.name='${model.hub_id}'",
        "hydra.job.chdir=true",
        "hydra.job.chdir='${dry_run}'",
        "hydra.job={chdir:true}",
        "hydra/job_logging=default",
        "hydra.job_logging.handlers.file.filename=/evil",
        "hydra.runtime.output_dir=/evil",
        "+hydra.callbacks.x._target_=os.system",
    ],
)
def test_hydra_writes_nowhere_else_and_starts_no_thousands_of_processes(word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (reported,) = errors(commandline.rewrite, ["seed=1,2", "hydra/launcher=joblib", word])
    assert reported.startswith(f"Invalid {word}: ")
    assert "; write " in reported or "; leave it out" in reported or "; set " in reported or "such as" in reported
    assert run_exp.main(["-m", "seed=1,2", "hydra/launcher=joblib", word]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "word",
    [
        "hydra.launcher.n_jobs=-1",
        "hydra.launcher.n_jobs=256",
        "hydra.launcher.timeout_min=100000",
        "hydra.sweep.dir=/scratch/sweep",
        "hydra.sweep.subdir='jobs/${hydra.job.num}'",
        "hydra.sweep.subdir=.",
        "hydra.job.name=flat lora",
        "hydra.job.chdir=false",
        "hydra.job.env_set.OMP_NUM_THREADS=4",
        "~hydra.job.chdir",
    ],
)
def test_settings_of_hydra_that_stay_inside_are_taken(word):
    assert commandline.rewrite([word]) == ([word], [])


def test_references_to_other_keys_do_not_multiply():
    doubled = [f"k{i}='${{k{i + 1}}}${{k{i + 1}}}'" for i in range(40)]
    (reported,) = errors(run_exp.experiment_of, [*doubled, "k40=x"])
    assert reported.startswith("Too many references")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--resolve"], "Invalid --resolve without --cfg"),
        (["--package", "optim"], "Invalid --package without --cfg"),
        (["--cfg"], "it is one of job, hydra, all"),
        (["--cfg", "foo"], "it is one of job, hydra, all"),
        (["--info=foo"], "it is one of all, config"),
        (["--multirun=3"], "nothing follows --multirun"),
        (["--multi"], "did you mean --multirun?"),
        (["--foo"], "Unknown option --foo"),
        (["-m", "--cfg", "job"], "each of them is a command; choose one"),
        (["--config-dir", "/none/such"], "there is no such folder"),
        (["--config-dir="], "Missing value of --config-dir"),
        (["-cd", "n" * 300], "there is no such folder"),
        (["-sc", "install=bash"], "it is not offered here"),
        (["--shell-completion", "query=bash"], "it is not offered here"),
        (["--experimental-rerun", "a.pickle"], "it is not offered here"),
        (["--config-name", "nope"], "Hydra refuses the command"),
    ],
)
def test_options_are_checked_before_hydra_sees_them(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run_exp.py"])
    assert run_exp.main([*words, "dry_run=true"]) == 2
    reported = "".join(capsys.readouterr())
    assert reason in reported
    assert "Traceback" not in reported
    assert not list(tmp_path.iterdir())


def test_the_help_about_options_offers_what_there_is(capsys):
    assert run_exp.main(["--hydra-help"]) == 0
    reported = capsys.readouterr().out
    forms = {form for name, (short, _) in commandline._FLAGS.items() for form in (name, short) if form}
    offered = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", reported))
    assert offered | {"--hydra-help"} == forms
    assert "completion" not in reported


def test_option_files_of_ones_own_leave_no_log(tmp_path, monkeypatch, capsys):
    own = tmp_path / "it's mine"
    (own / "peft").mkdir(parents=True)
    (own / "peft" / "mine.yaml").write_text("defaults: [lora, _self_]\nname: mine\nlora_r: 3\n")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("sys.argv", ["run_exp.py"])
    for flags in (["--config-dir", str(own)], ["-m", "-cd", str(own)], [f"--config-dir={own}", "--run"]):
        assert run_exp.main([*flags, "peft=mine", "dry_run=true"]) == 0
        assert "lora_r=3" in " ".join(capsys.readouterr().out.split())
    assert run_exp.main(["--config-dir", str(own), "peft=mien", "dry_run=true"]) == 2
    assert "did you mean peft=mine?" in capsys.readouterr().err
    assert not list((tmp_path / "cwd").iterdir())


def test_several_values_without_a_sweep_are_errors():
    reported = errors(run_exp.experiment_of, ["model=llama,smollm", "seed=1,2"])
    assert reported == [f"Several values in {word}: a sweep needs -m." for word in ("model=llama,smollm", "seed=1,2")]


def test_texts_that_hydra_would_read_as_more_are_reported_with_how_to_write_them():
    def prompt(word):
        return run_exp.experiment_of(["model=sdxl_tiny", "dataset=shapes", word]).dataset.prompt

    (reported,) = errors(prompt, "dataset.prompt=a dog, sitting")
    assert reported.endswith(
        """a text with a comma stands in quotes of its own, as dataset.prompt="'a dog, sitting'"."""
    )
    assert prompt("dataset.prompt='a dog, sitting'") == "a dog, sitting"
    (reported,) = errors(prompt, "dataset.prompt=a ${x} dog")
    assert "'x' not found" in reported
    assert "${KEY} takes the value of another key" in reported
    assert prompt(r"dataset.prompt=a \${x} dog") == "a ${x} dog"


SIGNS = [*" !\"#$%&'()*+,-.:;<=>?@[\\]^_`{|}~", "é", "漢", "模型", "😀"]


def text_of(key, words):
    """What a key is when the words of a shell are given."""
    words, _ = commandline.rewrite(words)
    found = commandline.compose_config(run_exp.SUITE.conf_dir, words)
    for part in key.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("data_root", "{}b"),
        pytest.param("model.hub_id", "/a/b{}c", marks=pytest.mark.extra),
        pytest.param("wandb.name", "a{}", marks=pytest.mark.extra),
    ],
)
def test_a_folder_of_any_name_can_be_given(key, form, sign):
    """As typed, or as the error says; the shell itself reads what it says."""
    name = form.format(sign)
    try:
        found = text_of(key, [f"{key}={name}"])
        assert found == name
    except ConfigError as error:
        (message,) = error.errors
        quoted = message.rpartition(", as ")[2].removesuffix(".")
        assert text_of(key, shlex.split(quoted)) == name


def test_names_with_several_signs_reach_the_run():
    name = "a=b(c)[d]#%:'{e},漢😀~"
    (message,) = errors(commandline.rewrite, [f"wandb.name={name}"])
    words = shlex.split(message.rpartition(", as ")[2].removesuffix("."))
    found = experiment(*words, "wandb.mode=disabled")
    assert found.run_name() == name
    settings, _ = commandline.name_jobs([*words, "rho=flat", "rho.sigma=0,0.05"])
    jobs = run_exp.experiments_of(commandline.expand_sweep(settings))
    assert [job.run_name() for job in jobs] == [f"{name}-0", f"{name}-0.05"]


def test_a_home_folder_is_written_for_the_shell():
    (message,) = errors(commandline.rewrite, ["data_root=~/sets"])
    assert message.endswith("write data_root=$HOME/sets, or the whole path.")


def test_every_error_of_every_job_is_reported():
    reported = errors(run_exp.experiments_of, [["peft=loar"], ["seed=1"], ["peft=lroa"], ["peft=loar"]])
    assert [message.partition(":")[0] for message in reported] == [
        "Unknown option peft=loar",
        "Unknown option peft=lroa",
    ]


def test_split_flags():
    words = ["-m", "seed=1", "--cfg", "job", "--config-name", "other", "model=llama", "--info"]
    assert commandline.split_flags(words) == (
        ["-m", "--cfg", "job", "--config-name", "other", "--info"],
        ["seed=1", "model=llama"],
    )


@pytest.mark.parametrize("function", [commandline.rewrite, commandline.expand_sweep, run_exp.experiment_of])
def test_unreadable_words_are_one_error_each(function):
    reported = errors(function, ["lora", "seed=1", "a=[1", "peft.lora_r"])
    assert [message.partition(":")[0] for message in reported] == [
        "Cannot read 'lora'",
        "Cannot read 'a=[1'",
        "Cannot read 'peft.lora_r'",
    ]


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        (["model=lama"], ["Unknown option model=lama: did you mean model=llama?"]),
        (
            ["model=lama", "peft=loar"],
            ["Unknown option peft=loar: did you mean peft=lora?", "Unknown option model=lama:"],
        ),
        (["model=lama", "rhoo=0.05"], ["Unknown option model=lama:", "Unknown key rhoo: did you mean rho?"]),
        (
            ["dataset=metamath", "rho=flat", "rho.sigma=-1"],
            ["Unknown option dataset=metamath:", "Invalid rho.sigma=-1"],
        ),
        (["eval=[gsm8k,foo,bar]"], ["Unknown option eval=foo:", "Unknown option eval=bar:"]),
        (["rho=true"], ["Unknown option rho=True:"]),
        (["peft=null"], ["Unknown option peft=null:"]),
        (["eval=null", "seed=-1"], ["Unknown option eval=null:", "Invalid seed=-1"]),
        (
            ["peft=lroa", "model.hub_id=${nothing}"],
            ["Unknown option peft=lroa:", "The configuration does not compose:"],
        ),
        # What belongs to an option that is not there cannot be judged, and is not.
        (["dataset=metamath", "dataset.max_tokens=3", "model=clip_b32"], ["Unknown option dataset=metamath:"]),
    ],
)
def test_each_faulty_word_is_one_error(settings, heads):
    reported = errors(run_exp.experiment_of, settings)
    assert len(reported) == len(heads)
    assert all(message.startswith(head) for message, head in zip(reported, heads, strict=True)), reported


def partners(group, option, folder):
    """What an option needs besides the defaults, which are a text model on a text set."""
    if group == "eval":
        corrupted = ["model=clip_tiny", "dataset=digits", f"eval.corruptions.folder={folder}"]
        allowed = ["eval.allow_code_execution=true"]
        judged = ["eval.mt_bench.judge=j", "eval.mt_bench.judge_url=http://127.0.0.1:1/v1"]
        return {
            "humaneval": allowed,
            "humaneval_plus": allowed,
            "mbpp": allowed,
            "lm_eval": ["eval.lm_eval.tasks=[arc_easy]"],
            "mt_bench": judged,
            "glue": ["dataset=sst2"],
            "text_to_image": ["model=sdxl_tiny", "dataset=shapes"],
            "images": corrupted[:2],
            "corruptions": corrupted,
        }.get(option, [])
    if group == "protocol" and option != "none":
        return [f"model={'llama32_3b' if option == 'peft_suite' else 'llama'}", "dataset=meta_math"]
    if group == "trainer" and option.startswith("fsdp"):
        return ["eval=[]"]
    if group == "model" and option in ("causal_lm", "seq2seq"):
        return ["model.hub_id=owner/name"]
    if group == "model" and option.startswith(("encoder", "roberta", "deberta")):
        return ["dataset=cola", *(["model.hub_id=owner/name"] if option == "encoder" else [])]
    if group == "model" and option.startswith(("clip_", "sdxl")):
        return ["dataset=digits" if option.startswith("clip_") else "dataset=shapes"]
    if (group, option) == ("dataset", "custom"):
        return [f"dataset.path={folder}"]
    text = (run_exp.SUITE.conf_dir / group / f"{option}.yaml").read_text()
    if group == "dataset" and "loader: text_to_image" in text:
        return ["model=sdxl_tiny", *([f"dataset.folder={folder}"] if option == "pictures" else [])]
    return ["model=clip_tiny"] if group == "dataset" and "loader: images" in text else []


# The file of lm_eval is in make test-all: the names of all its tasks are read for it.
@pytest.mark.parametrize(
    ("group", "option"),
    [pytest.param(*each, marks=pytest.mark.extra if each == ("eval", "lm_eval") else ()) for each in OPTIONS],
)
def test_every_option_file_composes_and_parses(group, option, tmp_path):
    np.save(tmp_path / "labels.npy", np.zeros(5, np.uint8))
    np.save(tmp_path / "fog.npy", np.zeros((5, 32, 32, 3), np.uint8))
    word = f"{group}=[{option}]" if group == "eval" else f"{group}={option}"
    found = run_exp.experiment_of([word, *partners(group, option, tmp_path)])
    if group == "eval":
        assert list(found.eval) == [option]
    elif group == "protocol":
        assert found.protocol == (None if option == "none" else option)
    elif option != "all":  # peft=all is another name of lora
        assert getattr(found, group).name == option


@pytest.mark.parametrize(
    "words", [["model=clip_b32"], ["dataset=cifar10"], ["model=sdxl"], ["model=sdxl", "dataset=sst2"]]
)
def test_pictures_and_text_do_not_mix(words):
    (message,) = errors(run_exp.experiment_of, words)
    assert "CLIP takes image data sets, SDXL text-to-image ones, language models text" in message


def test_a_model_chooses_the_layers_and_the_rank_of_its_paper():
    words = ["model=sdxl", "dataset=icons3d", "rho=flat"]
    found = run_exp.experiment_of(words)
    assert (found.peft.lora_r, found.peft.lora_alpha, found.peft.target_modules) == (4, 4, "attention")
    assert (found.rho.sigma, found.optim.lr, found.trainer.max_steps) == (0.1, 1e-4, 500)
    named = run_exp.experiment_of([*words, "peft=lora"]).peft
    assert (named.lora_r, named.target_modules) == (8, "all")


def test_there_are_option_files():
    assert {"model", "dataset", "peft", "rho", "trainer", "eval"} <= {group for group, _ in OPTIONS}


def test_later_words_win_and_options_set_other_sections():
    assert run_exp.experiment_of(["seed=1", "seed=2"]).seed == 2
    assert run_exp.experiment_of(["peft=full_ft"]).optim.lr == 1e-4
    assert run_exp.experiment_of(["peft=full_ft", "optim.lr=3e-5"]).optim.lr == 3e-5
    assert run_exp.experiment_of(["eval=[]"]).eval == {}


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        (["dry_run=true"], 0, ["smollm", "off: no perturbation"]),
        ([*PUBLISHED, "++rho=0.05", "dry_run=true"], 0, ["results/P_meta_math/vanilla_lora/42", "sigma=0.05"]),
        (["-m", "++rho=0,0.05", "trainer.max_steps=2,4", "dry_run=true"], 0, ["off: no", "sigma=0.05", "max_steps=4"]),
        (["model=lama", "rhoo=1"], 2, ["2 errors: nothing was loaded or written.", "model=llama", "did you mean rho?"]),
        (["nonsense"], 2, ["1 error:", "Cannot read 'nonsense'"]),
        (["-m", "seed=-1,-2"], 2, ["2 errors", "seed=-1", "seed=-2"]),
    ],
)
def test_exit_codes_and_nothing_is_written(words, code, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_exp.main(words) == code
    output = " ".join("".join(capsys.readouterr()).split())
    assert all(text in output for text in printed), output
    assert not list(tmp_path.iterdir())


def test_hydras_own_options_see_the_canonical_words(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run_exp.py"])
    run_exp.main(["--cfg", "job", "++rho=0.07", "trainer.max_steps=3"])
    printed = capsys.readouterr().out
    assert "sigma: 0.07" in printed
    assert "max_steps: 3" in printed


@pytest.mark.parametrize(
    "flags", [["--cfg", "job"], ["--cfg=all"], ["-c", "job", "-p", "eval.mt_bench"], ["-i"], ["-i=config"]]
)
def test_what_hydra_shows_has_no_password(flags, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run_exp.py"])
    words = ["eval=[mt_bench]", "eval.mt_bench.judge=j", "eval.mt_bench.judge_url=http://me:pa55@h/v1"]
    run_exp.main([*flags, *words])
    reported = "".join(capsys.readouterr())
    assert "http://***@h/v1" in reported
    assert "pa55" not in reported


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["wandb.name=N", "rho.sigma=0,0.05"], "wandb.name=N-${rho.sigma}"),
        (["wandb.name=N", "peft=lora,qv", "optim.lr=1e-3,1e-4", "seed=0,1"], "wandb.name=N-${peft.name}-${optim.lr}"),
        (["wandb.name=N", "seed=0,1"], "wandb.name=N"),
        (["wandb.name=a,b", "rho.sigma=0,0.05"], "wandb.name=a,b"),
        (["wandb.name=N", "eval=[gsm8k],[]"], "wandb.name=N"),
        (["wandb.name=N", "eval=[gsm8k],[]", "optim.lr=1e-3,1e-4"], "wandb.name=N-${optim.lr}"),
        (["wandb.name=N", "peft.target_modules=[q_proj],[v_proj]"], "wandb.name=N-${peft.target_modules.0}"),
        (["wandb.name=N", "model.revision=null,v2"], "wandb.name=N-${model.revision}"),
    ],
)
def test_jobs_of_a_sweep_have_their_own_names(words, named):
    settings, notes = commandline.name_jobs(words)
    assert settings[0] == named
    assert settings[1:] == words[1:]
    assert bool(notes) == (named != words[0])


def test_jobs_over_lists_have_usable_names():
    settings, _ = commandline.name_jobs(["wandb.name=N", "peft.target_modules=[q_proj,k_proj],[v_proj,o_proj]"])
    jobs = run_exp.experiments_of(commandline.expand_sweep(settings))
    assert [job.run_name() for job in jobs] == ["N-q_proj+k_proj", "N-v_proj+o_proj"]


def test_jobs_that_differ_in_their_benchmarks_alone_are_refused_for_their_one_folder():
    settings, _ = commandline.name_jobs(["wandb.name=N", "eval=[gsm8k],[]"])
    (reported,) = errors(run_exp.experiments_of, commandline.expand_sweep(settings))
    assert reported.startswith("Two jobs of the sweep would write to ")


@pytest.mark.parametrize(
    "word",
    [
        "peft.target_modules=[q_proj,k_proj],[v_proj]",
        "peft.target_modules=[q_proj],all",
        "peft.target_modules=[],[]",
        "model.hub_id=a/b,c/d",
        "model.revision='a b',c",
    ],
)
def test_swept_values_that_make_no_folder_names_are_refused(word):
    (reported,) = errors(commandline.name_jobs, ["wandb.name=N", word])
    assert reported.startswith(
        f"Invalid wandb.name=N with {word}: these values make no folder names; leave out wandb.name"
    )
    assert commandline.name_jobs([word]) == ([word], [])


@pytest.mark.parametrize(
    ("words", "sigma"),
    [
        (["rho=flat", "model=clip_b32"], 0.15),
        (["model=clip_b16", "rho=flat_linear"], 0.15),
        (["rho=flat", "model=t5base"], 0.05),
        (["rho=flat"], 0.05),
        (["rho=flat", "model=clip_b32", "rho.sigma=0.2"], 0.2),
        (["model=clip_b32", "++rho=0.1"], 0.1),
        (["model=clip_b32"], 0.0),
        (["model=clip_b32", "++rho=0"], 0.0),
    ],
)
def test_sigma_is_the_papers_for_the_kind_of_model(words, sigma):
    assert commandline.compose_config(run_exp.SUITE.conf_dir, commandline.rewrite(words)[0])["rho"]["sigma"] == sigma


def test_an_experiment_file_may_set_what_config_yaml_sets(tmp_path):
    shutil.copytree(run_exp.SUITE.conf_dir, tmp_path / "conf")
    (tmp_path / "conf/experiment").mkdir(exist_ok=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text("# @package _global_\nseed: 7\nwandb: {project: mine}\n")
    found = commandline.compose_config(tmp_path / "conf", ["experiment=mine"])
    assert (found["seed"], found["wandb"]["project"]) == (7, "mine")
    assert commandline.compose_config(tmp_path / "conf", ["experiment=mine", "seed=8"])["seed"] == 8
