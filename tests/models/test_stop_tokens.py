"""What ends an answer: a model whose turns end with a token of their own learns that, and is read so."""

import copy
import json
from pathlib import Path
from typing import Any

import merge
import pytest
from running import run
from toys import CHATML, GEMMA, PHI, say, stops_of, with_turns, write_family, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.models.stop_tokens import find_turn_end, get_stop_token_ids
from tinydpo.run_folder import was_trained_on_chat

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = [say("user", "Hi!"), say("assistant", "Hello."), say("user", "How are you?")]
ROWS = [
    {"prompt": ASKED, "chosen": [say("assistant", f"Well, {i}.")], "rejected": [say("assistant", f"Bad, {i} times!")]}
    for i in range(4)
]
SHAPED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "bad_words_ids": [[9]]}
PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("ending") / "rows", ROWS)


@pytest.fixture(scope="module")
def sft(tiny_model: Path, rows: Path) -> Path:
    gemma = write_family(tiny_model, rows.parent / "gemma", GEMMA, **SHAPED)
    return train("sft", gemma, rows, rows.parent / "sft")


def train(stage: str, model: Path, data: Path, folder: Path, *flags: str) -> Path:
    run(stage, "--model_name_or_path", model, "--dataset_name", data, "--output_dir", folder, "--max_steps", "1",
        "--pairs_per_step", "2", "--per_device_train_batch_size", "2", "--eval_strategy", "no", *flags)  # fmt: skip
    return folder


def assert_samples_plainly(folder: Path) -> None:
    saved = json.loads((folder / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sorted(saved.pop("eos_token_id")) == stops_of(tokenizer), "a stop token is lost: answers would not end"
    assert (saved.pop("pad_token_id"), saved.pop("bos_token_id")) == (tokenizer.pad_token_id, tokenizer.bos_token_id)
    saved.pop("transformers_version")
    assert saved == PLAIN, "the saved model does not sample from its own distribution"


def test_a_saved_model_keeps_all_stop_tokens_and_samples_plainly(sft: Path, rows: Path, tmp_path: Path):
    assert_samples_plainly(sft)
    adapter = train("dpo", sft, rows, tmp_path / "lora", "--use_peft", "true")
    merge.main(["--model_name_or_path", str(adapter), "--output_dir", str(tmp_path / "merged")])
    assert_samples_plainly(tmp_path / "merged")
    assert was_trained_on_chat(str(tmp_path / "merged")), (
        "the playground would ask the merged model in a different form"
    )


def test_a_run_knows_whether_its_rows_were_chat(sft: Path, tiny_model: Path, tmp_path: Path):
    assert was_trained_on_chat(str(sft)) and was_trained_on_chat(str(sft / "checkpoint-1"))
    assert was_trained_on_chat(str(tiny_model)) is None, "a model without a run has no rows"
    texts = [{"prompt": "\n\nHuman: Hi!\n\nAssistant:", "chosen": f" {i}.", "rejected": " No"} for i in "ab"]
    chatml = write_family(tiny_model, tmp_path / "chatml", CHATML)
    folder = train("sft", chatml, write_rows(tmp_path / "texts", texts), tmp_path / "run")
    assert was_trained_on_chat(str(folder)) is False, "a chat model trained on HH's texts would be asked in turns"


@pytest.mark.parametrize("template", [GEMMA, PHI, CHATML])
def test_training_ends_an_answer_as_the_template_ends_a_turn(template: str, rows: Path, tiny_tokenizer: Any):
    tokenizer = with_turns(copy.deepcopy(tiny_tokenizer), template)
    end = "<|im_end|>" if template == CHATML else "<end>"
    pairs = load_pairs(DataArguments(dataset_name=str(rows)), tokenizer, 128)["train"].pairs
    for row, pair in zip(ROWS, pairs, strict=True):
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=False)
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        learnt = pair["prompt_ids"] + pair["chosen_ids"]
        assert learnt == ids[: len(learnt)], "what is learnt is not what the template writes"
        assert tokenizer.decode(pair["chosen_ids"]) == row["chosen"][0]["content"] + end, "an answer ends elsewhere"
        assert pair["chosen_ids"][-1] in stops_of(tokenizer)


def test_an_answer_that_is_cut_has_no_end(rows: Path, tiny_tokenizer: Any):
    tokenizer = with_turns(copy.deepcopy(tiny_tokenizer), GEMMA)
    data = DataArguments(dataset_name=str(rows), max_question_length=20)
    for pair in load_pairs(data, tokenizer, 24)["train"].pairs:
        assert not {*pair["rejected_ids"]} & {*stops_of(tokenizer)}, "a cut answer ends as if it were whole"


def test_stop_tokens_come_from_tokenizer_config_and_template(tiny_model: Path, tmp_path: Path):
    folder = write_family(tiny_model, tmp_path / "phi", PHI)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<end>")
    for listed, expected in ((None, {0, end}), ([0, end], {0, end}), ([end, 5], {0, end, 5})):
        model.generation_config = GenerationConfig(eos_token_id=listed)
        assert {*get_stop_token_ids(model, tokenizer)} == expected, f"with {listed} in the generation config"
    assert find_turn_end(tokenizer).token == "<end>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} (over)\n{% endfor %}"
    assert find_turn_end(tokenizer) is None, "a template that ends turns in plain text has no token for it"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert get_stop_token_ids(model, tokenizer) == [0, end, 5], "a template that raises ends nothing"
