"""A prompt as those who are asked need it: what was typed becomes turns, and turns become what people read."""

from hypothesis import given
from hypothesis import strategies as st

from tinydpo.data.text import format_dialogue, format_prompt, typed_to_dialogue, typed_to_messages

words = (
    st.text(st.characters(exclude_categories=["Cs"])).map(str.strip).filter(lambda text: text and "\n\n" not in text)
)


def test_what_is_typed_becomes_turns():
    for typed, turns in (
        (" What now?\n", [("user", "What now?")]),
        ("Human: Hi\n\nAssistant: Hello\n\nHuman: Bye", [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]),
        ("\n\nHuman: Hi\n\nAssistant:", [("user", "Hi")]),
        ("Be kind.\n\nHuman: Hi", [("system", "Be kind."), ("user", "Hi")]),
        ("Is 'Human: Fall Flat' fun?", [("user", "Is 'Human: Fall Flat' fun?")]),
        ("half \ud83d", [("user", "half ?")]),
    ):
        assert [(turn["role"], turn["content"]) for turn in typed_to_messages(typed)] == turns, f"{typed!r} is misread"


@given(st.lists(words, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2))
def test_people_and_models_see_the_same_turns(turns: list[str]):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    assert typed_to_messages(format_prompt(messages)) == messages, "a dialogue as it is shown is read as another"
    assert typed_to_dialogue(format_prompt(messages)) == format_prompt(messages), (
        "shown, a conversation is not in HH's form"
    )


def test_other_roles_and_calls_are_shown():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}
    shown = format_dialogue([{"role": "system", "content": "Be brief."}, call, {"role": "tool", "content": "12:00"}])
    assert shown == '\n\nSystem: Be brief.\n\nAssistant: [{"function": {"name": "clock"}}]\n\nTool: 12:00'
