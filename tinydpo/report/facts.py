"""How a report's figures were made: seeds, versions, data and settings, in tables."""

from typing import Any

from tinydpo.files import public_name
from tinydpo.launching.arguments import list_sources


def collect_provenance(results: dict[str, Any], frontier: dict[str, Any], runs: dict[str, dict[str, Any]]) -> dict[str, list]:
    """For each run, the evaluation and the frontier a table, in (name, value) rows, of what it depends on."""
    settings = results.get("settings", {})
    columns = {title: _run_facts(run) for title, run in runs.items()}
    if settings:
        columns["Evaluation"] = {
            "seed": settings["seed"],
            "data": _data(settings),
            "pairs": f"{results['pairs']:,} held out",
            "sampling": f"{settings['num_prompts']} prompts at temperature {settings['temperature']:g}, "
            f"top_k {settings['top_k']}, top_p {settings['top_p']:g}",
            "β": f"{results['beta']:g}",
            "tokens": f"{settings['max_length']} of prompt and answer",
            "dtype": settings["dtype"],
        }
    if common := frontier.get("settings"):
        facts = {"prompts": common.get("num_prompts"), "sampling seed": common.get("sample_seed")}
        columns["Frontier"] = facts | {"data": _data(common)}
    return {
        title: [(name, value) for name, value in facts.items() if value not in (None, "")]
        for title, facts in columns.items()
    }


def _run_facts(run: dict[str, Any]) -> dict[str, Any]:
    config, environment, train = run["config"], run["environment"], run["data"].get("train", {})
    packages = environment.get("packages", {})
    return {
        "seed": config.get("seed", environment.get("seed")),
        "starts from": public_name(config.get("model_name_or_path") or "", config.get("model_revision")),
        "data": _data(config),
        "pairs": f"{train['pairs_kept']:,} of {train['pairs_in']:,} kept" if "pairs_kept" in train else None,
        "loss": " + ".join(config.get("loss_type") or ()) if "beta" in config else None,
        "β": config.get("beta"),
        "learning rate": config.get("learning_rate"),
        "epochs": config.get("num_train_epochs"),
        "pairs per step": config.get("pairs_per_step"),
        "tokens": config.get("max_length"),
        "speed": _speed(run["results"]),
        "commit": environment.get("git_commit"),
        "device": environment.get("device"),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }


def _speed(results: dict[str, Any]) -> str:
    told = {
        "pairs_per_second": "{:.3g} pairs a second",
        "tokens_per_second": "{:,.0f} tokens a second",
        "padding": "{:.1%} of the positions padding",
        "mfu": "{:.1%} of the devices' peak (MFU)",
    }
    return ", ".join(text.format(results[name]) for name, text in told.items() if name in results)


def _data(settings: dict[str, Any]) -> str:
    told = (filter(None, (public_name(one.name, one.revision), one.data_dir)) for one in list_sources(settings))
    return ", ".join(map(" ".join, told))
