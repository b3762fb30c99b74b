"""Each command from end to end, with a tiny model."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.cli import parse, run
from lora_jax.interop.pretrained import load_pretrained
from lora_jax.models import decoder
from lora_jax.training.options import FinetuneOptions

RUN_FILES = {
    "adapter", "curves.png", "curves.svg", "metrics.jsonl", "results.json", "run.json",
    "checkpoints",
}  # fmt: skip


def entries(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def adapted_logits(folder, model, tokens):
    base = load_pretrained(model, scan_layers=True)
    adapter, _ = lora.restore(folder / "adapter", base.params)
    apply = lora.lift(functools.partial(decoder.apply, base.config))
    return apply(lora.combine(base.params, adapter), tokens)


def test_finetune_learns_and_writes_everything(trained):
    assert {path.name for path in trained.iterdir()} == RUN_FILES
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["4", "8"]
    steps = entries(trained, "train")
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    assert set(steps[0]) == {
        "kind", "step", "loss", "learning_rate", "grad_norm", "tokens", "learned_tokens", "seconds",
    }  # fmt: skip
    evaluations = entries(trained, "evaluation")
    assert [entry["step"] for entry in evaluations] == [0, 4, 8]
    assert evaluations[-1]["loss"] < 0.7 * evaluations[0]["loss"]
    assert evaluations[0]["examples"] == 6
    results = json.loads((trained / "results.json").read_text())
    assert results["before"] == evaluations[0]
    assert results["after"] == evaluations[-1]
    assert len(results["samples"]) == 3
    assert all(re.fullmatch("[ab]{7}", sample["prompt"]) for sample in results["samples"])
    assert {sample["wanted"] for sample in results["samples"]} <= {"a", "b"}
    about = json.loads((trained / "run.json").read_text())
    assert about["prompt"] == {"chat": True, "system": "Count.", "suffix": ""}
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (trained / "curves.svg").read_bytes()


def test_the_same_seed_gives_the_same_run_and_tells_about_it(tmp_path, options, trained, capsys):
    assert run(["finetune", *options, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for pattern in (
        r"2 layers of 32", r"60 records; 54 to learn from, 6 held out", r"q_proj", r"tokens/s",
        r"Held out, after step 0", r"\d+\.\d% before, \d+\.\d% after", "wanted: ", "before: ",
        "after: ", r"seconds in all\. In ",
    ):  # fmt: skip
        assert re.search(pattern, said), pattern
    assert said.count("wanted: ") == 3
    assert "lm_head" not in said
    for one, two in zip(*(entries(f, "train") for f in (trained, tmp_path / "run")), strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_a_run_killed_before_its_first_save_starts_from_its_beginning(tmp_path, trained):
    shutil.copy(trained / "run.json", tmp_path / "run.json")
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"kind": "tr')
    assert run(["finetune", "--resume", "--out", str(tmp_path)]) == 0
    for kind in ("train", "evaluation"):
        one, two = entries(tmp_path, kind), entries(trained, kind)
        assert [{**e, "seconds": 0} for e in one] == [{**e, "seconds": 0} for e in two]


@pytest.mark.parametrize("form", ["completion", "text"])
def test_finetune_on_plain_text(tmp_path, model, form):
    lines = [f"{n} and {n}" for n in range(20)]
    records = {
        "completion": [{"prompt": line[:-1], "completion": line[-1]} for line in lines],
        "text": [{"text": line} for line in lines],
    }[form]
    data = tmp_path / "plain.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    arguments = [
        *("finetune", "--model", str(model), "--data", str(data), "--rank", "2", "--epochs", "2"),
        *("--rows", "2", "--accumulate", "2", "--row-length", "32", "--held-out", "0.25"),
        *("--dropout", "0.1", "--unroll", "--remat", "--out", str(tmp_path / "run")),
    ]
    assert run(arguments) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["prompt"] == {
        "chat": False, "system": None, "suffix": "",
    }  # fmt: skip
    assert entries(tmp_path / "run", "evaluation")[0]["examples"] == 5
    merged = ["merge", "--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]
    assert run(merged) == 0


def test_generate_prompts_as_in_training(trained, model, capsys):
    """The printed answer is the greedy continuation of the rendered chat."""
    base = load_pretrained(model, scan_layers=True)
    system, user = {"role": "system", "content": "Count."}, {"role": "user", "content": "abbabab"}
    text = base.tokenizer.render_chat([system, user], add_generation_prompt=True)
    ids, wanted = base.tokenizer.encode(text, add_special=False), []
    for _ in range(4):
        logits = adapted_logits(trained, model, jnp.array([ids + wanted]))
        wanted.append(int(logits[0, -1].argmax()))
        if wanted[-1] in base.tokenizer.eos_ids:
            break
    wanted = [token for token in wanted if token not in base.tokenizer.eos_ids]
    arguments = ["generate", "--adapter", str(trained), "--prompt", "abbabab"]
    assert run([*arguments, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == base.tokenizer.decode(wanted) + "\n"


def test_generate_with_a_base_alone(model, capsys):
    arguments = ["generate", "--model", str(model), "--prompt", "abc", "--form", "plain"]
    assert run([*arguments, "--max-new-tokens", "5", "--temperature", "1.0", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert run([*arguments, "--max-new-tokens", "5", "--temperature", "1.0", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert run([*arguments, "--max-new-tokens", "5", "--temperature", "1.0", "--seed", "4"]) == 0
    assert capsys.readouterr().out != first


@pytest.mark.filterwarnings("default")  # transformers warns about itself
def test_merge_writes_what_transformers_loads(trained, model, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    assert run(["merge", "--adapter", str(trained), "--model", str(model), "--out", str(out)]) == 0
    assert re.match(r"7 weights of .* merged", capsys.readouterr().out)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, 258, (2, 20))
    with torch.no_grad():
        got = theirs(torch.tensor(tokens)).logits.numpy()
    wanted = adapted_logits(trained, model, tokens)
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)
    base = load_pretrained(model)
    plain = decoder.apply(base.config, base.params, jnp.asarray(tokens))
    assert np.abs(got - plain).max() > 0.1  # the adapter is in it
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("abc")["input_ids"] == base.tokenizer.encode("abc")


def test_inspect_shows_config_base_and_table(trained, model, capsys):
    for folder, step in ((".", 8), ("adapter", 8), ("checkpoints", 8), ("checkpoints/4", 4)):
        assert run(["inspect", "--adapter", str(trained / folder)]) == 0
        said = capsys.readouterr().out
        assert f"Saved after step {step}\n" in said
        assert f"Base: {model}, float32, stacked layers" in said
        assert "rank: 4" in said
        assert 'exclude: ["lm_head/*"]' in said
        # Worked out: rank 4 times the sum of both sides, in two layers.
        sides = [32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 48, 32 + 48, 48 + 32]
        assert f"{4 * 2 * sum(sides):,} of " in said


FLAGS = {
    "finetune": (
        "model dtype unroll remat quantize data held-out rows row-length rank alpha targets "
        "exclude dropout rank-stabilized learning-rate schedule warmup weight-decay clip "
        "accumulate paged steps epochs evaluations seed out resume overwrite "
        "save-every keep resume-from mesh coordinator num-hosts host-id"
    ),
    "plan": "model method rank targets mesh batch-size seq-len dtype topology json",
    "generate": "prompt model adapter form system max-new-tokens temperature seed dtype",
    "merge": "adapter out model",
    "inspect": "adapter",
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_explains_every_option(command, capsys):
    assert run([command, "--help"]) == 0
    said = capsys.readouterr().out
    for flag in FLAGS[command].split():
        found = re.search(rf"--{flag}\b(?!-)", said)
        assert found, flag
        explained = re.sub(r"[│\s]+", " ", said[found.end() : found.end() + 400])
        assert re.search(r"[a-z]{2,} [a-z]", explained), flag
    flags = set(re.findall(r"^\W* --(?!no-)([a-z][a-z-]+)", said, flags=re.M))
    assert flags == set(FLAGS[command].split())


def test_help_lists_the_commands(capsys):
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("finetune", "plan", "generate", "merge"))
    assert "inspect" in said


def test_no_argument_is_the_main_job():
    assert parse(["finetune"]) == FinetuneOptions()


def test_a_run_of_several_targets_is_parsed():
    options = parse(["finetune", "--targets", "*/q_proj/kernel", "*/v_proj/kernel"])
    assert options.lora.targets == ("*/q_proj/kernel", "*/v_proj/kernel")
    assert jax.tree.leaves(options) == [options]
