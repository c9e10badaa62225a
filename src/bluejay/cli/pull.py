"""`bluejay pull`: fetch models from the hub."""

from __future__ import annotations

from typing import Annotated

import typer


def pull(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help=r"OWNER/NAME\[@REVISION] as on the hub, or gpt-j-6b, gpt-neo-125m, gpt-neo-1.3b, gpt-neo-2.7b.",
            show_default=False,
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit.", show_default="main")] = None,
) -> None:
    """Fetch models from the Hugging Face hub into its cache, and print where they are.

    Only config, tokenizer and one kind of weights are fetched. After an interruption the same command goes on where the
    download stopped. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured.

    [bold]Examples[/bold]

        bluejay pull gpt-neo-125m

        bluejay pull gpt-j-6b@float16

        HF_ENDPOINT=https://hub.example bluejay pull team/our-gpt-j --revision v2
    """
    from bluejay.checkpoints import hub
    from bluejay.checkpoints.hub_names import HubName

    wanted = [HubName.parse(name, revision) for name in names]  # all of them, before the first takes its time
    for name, model in zip(names, wanted, strict=True):
        typer.echo(hub.pull(name, revision))
        typer.echo(f'{model} is here; try: bluejay generate --model {model} "Once upon a time"', err=True)
