"""The default run tests these laws for a chain of four methods alone, which together use every hook;
`--slow` (make nightly) tests all laws for all methods. Each of them compiles programs of its own for every method, and
what it tests is done by shared code."""

import pytest

FOR_THE_CHAIN = {
    "test_chain_is_a_monoid",
    "test_removed_tokens_stay_removed_and_the_support_is_never_empty",
    "test_a_paused_decoding_goes_on_as_it_would_have",
    "test_it_acts_behind_a_soft_prompt_where_it_acts_alone",
    "test_eight_devices_give_what_one_gives",
    "test_a_vmapped_sweep_is_a_loop",
    "test_gradients_reach_only_the_control",
    "test_large_models_fit_on_paper",
}


def pytest_collection_modifyitems(items):
    for item in items:
        law = item.path.parent.name == "laws" and getattr(item, "originalname", "") in FOR_THE_CHAIN
        if law and item.callspec.params.get("name", "chain") != "chain":
            item.add_marker(pytest.mark.slow)
