"""Recipes are data: what the named ones say, how options change them, and the errors for wrong options."""

import copy
import dataclasses
import re
from typing import Any

import pytest

from swcompile import RECIPES, GemmFormat, Recipe, Role, Scaling, make_recipe

TENSOR, VECTOR = GemmFormat(weight=Scaling.TENSOR), GemmFormat(weight=Scaling.VECTOR)
BLOCKS = GemmFormat(weight=Scaling.BLOCK, other=Scaling.TOKEN)


@pytest.mark.parametrize(
    ("name", "output", "grad_input", "grad_weight", "save_int8_activations"),
    [
        ("switchback", TENSOR, TENSOR, None, False),
        ("switchback_m", TENSOR, TENSOR, None, True),
        ("switchback_q", VECTOR, VECTOR, None, False),
        ("switchback_full", TENSOR, TENSOR, BLOCKS, False),
        ("llm_int8", VECTOR, VECTOR, VECTOR, False),
    ],
)
def test_named_recipes(
    name: str, output: Any, grad_input: Any, grad_weight: Any, save_int8_activations: bool
) -> None:
    expected = Recipe(
        name=name,
        output=output,
        grad_input=grad_input,
        grad_weight=grad_weight,
        save_int8_activations=save_int8_activations,
    )
    assert make_recipe({"recipe": name}) == RECIPES[name]() == expected
    assert [expected.format_of(role) for role in Role] == [output, grad_input, grad_weight, None]
    assert output.other is Scaling.VECTOR


def test_there_is_no_recipe_beside_those() -> None:
    assert list(RECIPES) == ["switchback", "switchback_m", "switchback_q", "switchback_full", "llm_int8"]
    assert make_recipe({}) == RECIPES["switchback"]()


def test_a_recipe_is_frozen() -> None:
    recipe = make_recipe({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.strict = True  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.output.weight = Scaling.VECTOR  # type: ignore[misc, union-attr]
    changed = dataclasses.replace(recipe, strict=True)
    assert changed.strict and not recipe.strict and hash(changed) != hash(recipe)


def test_options_change_a_recipe() -> None:
    recipe = make_recipe({"include": "*.weight", "exclude": ["a", "b"], "strict": True, "skip_slower": False})
    assert (recipe.include, recipe.exclude) == (("*.weight",), ("a", "b"))
    assert recipe.strict and not recipe.skip_slower
    assert make_recipe({"include": []}).include == () and make_recipe({"include": None}).include is None


def test_a_recipe_of_ones_own_keeps_what_no_option_changes() -> None:
    own = Recipe(name="mine", output=VECTOR, include=("a.*",), exclude=("b",), skip_slower=False)
    assert make_recipe({"recipe": own}) == own
    changed = make_recipe({"recipe": own, "include": None, "exclude": "c", "strict": True})
    assert changed == dataclasses.replace(own, exclude=("c",), strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipie": "switchback"}, "unknown option 'recipie'; did you mean 'recipe'?"),
        ({"excluded": "a"}, "unknown option 'excluded'; did you mean 'exclude'?"),
        ({"mode": "default"}, "unknown option 'mode'; did you mean "),
        ({"recipe": "switchback-m"}, "unknown recipe 'switchback-m'; did you mean 'switchback_m'? Known: "),
        ({"recipe": None}, "unknown recipe None; did you mean "),
        ({"strict": 1}, "option 'strict' is 1; it takes True or False"),
        ({"skip_slower": None}, "option 'skip_slower' is None; it takes True or False"),
        ({"include": ["a", 1]}, "option 'include' is ['a', 1]; it takes a glob or a list of globs"),
        ({"exclude": [None]}, "option 'exclude' is [None]; it takes a glob or a list of globs"),
        ({"exclude": {"a": 1}}, "option 'exclude' is {'a': 1}; it takes a glob or a list of globs"),
        ({"include": 5}, "option 'include' is 5; it takes a glob or a list of globs"),
        ({"recipe": ["switchback"]}, "unknown recipe ['switchback']; did you mean 'switchback'? Known: "),
        ({1: 2}, "unknown option 1; did you mean "),
        *(
            ({option: True}, f"call swcompile.prepare(model, *inputs, {option}=True) first")
            for option in ("layer_scale", "qk_layernorm")
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_recipe(options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": Scaling.TENSOR, "other": Scaling.TENSOR}, "other is Scaling.TENSOR, but must be Scaling.VECTOR"),
        ({"weight": Scaling.VECTOR, "other": Scaling.TENSOR}, "other is Scaling.TENSOR, but must be Scaling.VECTOR"),
        ({"weight": "tensor"}, "weight is 'tensor', but must be one of Scaling.VECTOR, TENSOR, BLOCK and TOKEN"),
        ({"weight": Scaling.VECTOR, "other": None}, "other is None, but must be one of Scaling.VECTOR, TENSOR, BLOCK and TOKEN"),
    ],
)
def test_formats_that_cannot_run(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"GemmFormat: {message}")):
        GemmFormat(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exclude": "nothing.*"}, "exclude is 'nothing.*', but must be a tuple of globs, such as ('nothing.*',)"),
        ({"include": "*"}, "include is '*', but must be a tuple of globs, such as ('*',)"),
        ({"include": ["*"]}, "include is ['*'], but must be a tuple of globs"),
        ({"exclude": (1,)}, "exclude is (1,), but must be a tuple of globs"),
        ({"exclude": None}, "exclude is None, but must be a tuple of globs"),
        ({"name": None}, "name is None, but must be a string"),
        ({"output": Scaling.TENSOR}, "output is <Scaling.TENSOR: 'tensor'>, but must be a GemmFormat or None"),
        ({"strict": "yes"}, "strict is 'yes', but must be True or False"),
        ({"save_int8_activations": 1}, "save_int8_activations is 1, but must be True or False"),
    ],
)
def test_recipes_that_cannot_run(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Recipe: {message}")):
        Recipe(**({"name": "mine"} | values))
    with pytest.raises(ValueError, match=re.escape(f"Recipe: {message}")):
        dataclasses.replace(make_recipe({}), **values)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("blocks.0.fc.weight", True),
        ("*", True),
        ("blocks.*.weight", True),
        ("blocks.?.fc.*", True),
        ("blocks.[0-3].fc.weight", True),
        ("blocks.[!0].fc.weight", False),
        ("fc.weight", False),
        ("blocks.0.fc", False),
        ("Blocks.*", False),
        ("blocks.1.*", False),
    ],
)
def test_patterns(pattern: str, matches: bool) -> None:
    name = "blocks.0.fc.weight"
    assert make_recipe({"include": pattern}).included_by(name) is matches
    assert make_recipe({"include": ["x", pattern]}).included_by(name) is matches
    assert make_recipe({"exclude": ["x", pattern]}).excluded_by(name) == (pattern if matches else None)
    unmatched = make_recipe({"include": pattern}).unmatched_patterns([name])
    assert unmatched == ({} if matches else {pattern: name})


def test_no_include_asks_for_nothing_by_name() -> None:
    for options in ({}, {"include": []}):
        assert not make_recipe(options).included_by("fc.weight")
    assert make_recipe({}).excluded_by("fc.weight") is None


def test_the_first_exclude_pattern_is_the_reason() -> None:
    assert make_recipe({"exclude": ["a", "*.weight", "fc.*"]}).excluded_by("fc.weight") == "*.weight"


def test_unmatched_patterns_come_with_the_closest_name() -> None:
    recipe = make_recipe({"include": ["haed.*", "blocks.*"], "exclude": ["blcoks.0.fc", "head.weight"]})
    names = ["blocks.0.fc", "blocks.1.fc", "head.weight"]
    assert recipe.unmatched_patterns(iter(names)) == {"haed.*": "head.weight", "blcoks.0.fc": "blocks.0.fc"}
    assert make_recipe({"include": "a"}).unmatched_patterns([]) == {"a": ""}
    assert make_recipe({}).unmatched_patterns(names) == {}


def test_formats_that_no_kernel_has() -> None:
    block, token, tensor = Scaling.BLOCK, Scaling.TOKEN, Scaling.TENSOR
    for weight, other in ((block, Scaling.VECTOR), (tensor, token), (token, block), (token, token), (block, block), (tensor, block)):
        with pytest.raises(ValueError, match="go together: give weight=Scaling.BLOCK and other=Scaling.TOKEN"):
            GemmFormat(weight=weight, other=other)
    for role in ("output", "grad_input"):
        with pytest.raises(ValueError, match=f"{role} has scales by block, but only grad_weight"):
            Recipe(name="mine", **{role: BLOCKS})


@pytest.mark.parametrize("value", ["yes", 1])
def test_fuse_is_true_false_or_none(value: Any) -> None:
    with pytest.raises(ValueError, match="option 'fuse' is .*; it takes True or False"):
        make_recipe({"fuse": value})
    assert [make_recipe({"fuse": fuse}).fuse for fuse in (True, False, None)] == [True, False, None]


def test_a_copied_recipe_is_the_same_recipe() -> None:
    recipe = copy.deepcopy(RECIPES["switchback_full"]())
    assert recipe == RECIPES["switchback_full"]() and dataclasses.replace(recipe, strict=True).strict
