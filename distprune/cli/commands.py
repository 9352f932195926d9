"""The commands. Their names and options are frozen by a test."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="distprune",
    help="Search over pruning paradigms, per-layer sparsity budgets and regularization schedules.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[Path, typer.Argument(help="YAML file.", show_default=False)]
RunArgument = Annotated[str, typer.Argument(help="Run folder, such as runs/digits, or its URL.", show_default=False)]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to join, as one of its machines: HEAD:6379, or auto. By default Ray starts on this machine.", show_default=False
    ),
]
Head = Annotated[str, typer.Option("--address", help="Ray dashboard, such as http://HEAD:8265.", show_default=False)]
Job = Annotated[str, typer.Argument(help="Job id, as submit printed it.", show_default=False)]
Pip = Annotated[Path | None, typer.Option(help="Requirements file, all pinned, that each node installs by pip.", show_default=False)]
Uv = Annotated[Path | None, typer.Option(help="The same, installed by uv.", show_default=False)]
Follow = Annotated[bool, typer.Option(help="Show the job's output until it ends, and return its exit code.")]
Trials = Annotated[int | None, typer.Option(help="How many trials there are in the end.", show_default=False)]
Cost = Annotated[float | None, typer.Option(help="Billed samples of all trials together.", show_default=False)]
Wall = Annotated[float | None, typer.Option(help="Seconds.", show_default=False)]
Name = Annotated[str | None, typer.Option(help="Name of the run folder, in place of the file's.", show_default=False)]
Storage = Annotated[str | None, typer.Option(help="Folder of run folders or URL, in place of the file's.", show_default=False)]


@app.command()
def search(
    config: Config,
    name: Name = None,
    storage: Storage = None,
    trials: Trials = None,
    address: Address = None,
    simulate: Annotated[
        str | None, typer.Option(help="Run folder whose finished trials answer for this search's: nothing is trained.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Trials at once of a simulated search.", show_default=False)] = None,
) -> None:
    """Run a search and end with its Pareto table."""
    from distprune import api
    from distprune.cli.progress import Display

    limits = {"trials": trials} if trials is not None else None
    with Display() as display:
        result = api.search(
            config, name=name, storage=storage, limits=limits, address=address, simulate=simulate, workers=workers, listen=display
        )
    display.close_with(result)


@app.command()
def resume(
    run: Annotated[
        str,
        typer.Argument(
            help="Run folder, such as runs/digits, or URL of a run. With a dashboard's address: a job's id, or a run there.",
            show_default=False,
        ),
    ],
    trials: Trials = None,
    cost: Cost = None,
    wall: Wall = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to join: HEAD:6379, or auto. A dashboard, such as http://HEAD:8265, gets a new job.", show_default=False
        ),
    ] = None,
    pip: Pip = None,
    uv: Uv = None,
    follow: Follow = True,
) -> None:
    """Go on with an interrupted search, or extend a finished one: here, or as a new job of a cluster."""
    limits = {key: value for key, value in {"trials": trials, "cost": cost, "wall": wall}.items() if value is not None}
    if address is not None and address.startswith("http"):
        from distprune.cli import jobs

        raise typer.Exit(jobs.resume(run, address=address, limits=limits, environment=jobs.Environment(pip, uv), follow=follow))
    if pip or uv or not follow:
        raise typer.BadParameter("--pip, --uv and --no-follow are for a job: give the dashboard, --address http://HEAD:8265")
    from distprune import api
    from distprune.cli.progress import Display

    with Display() as display:
        result = api.resume(run, limits=limits, address=address, listen=display)
    display.close_with(result)


@app.command()
def run(
    config: Config,
    to: Annotated[Path | None, typer.Option(help="Export the network to this new folder.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Execute one recipe."""
    from distprune import api
    from distprune.cli.progress import Lines
    from distprune.export.writing import check_target

    if to is not None:
        check_target(to)  # now, not when all is trained
    outcome = api.run(config, device=device, listen=Lines())
    print(outcome.summary())
    if to is not None:
        print(f"exported to {outcome.export(to)}")


@app.command()
def plan(config: Config) -> None:
    """Show a recipe's stages, with sparsity and cost, without running them."""
    from distprune import api
    from distprune.report.tables import plan_table, show

    show(plan_table(api.prepare(config)))


@app.command()
def check(config: Config) -> None:
    """Validate a recipe or a search, and say what is never proposed and why."""
    from distprune import api

    for line in api.check(config):
        print(line)


@app.command(name="list")
def list_entries(
    kind: Annotated[str | None, typer.Argument(help="criterion, allocator, paradigm, ...", show_default=False)] = None,
) -> None:
    """Show every registered name with its options, paper and file."""
    from distprune.cli.listing import print_tables

    print_tables(kind)


@app.command()
def report(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Write the page again every few seconds until the search ends.")] = False,
    to: Annotated[
        Path | None, typer.Option(help="Write each figure to this new folder, as PNG and its numbers as CSV.", show_default=False)
    ] = None,
) -> None:
    """Show what a search found, from its folder, and write its page, report.html; it may still be running."""
    from distprune.report.shown import follow, show_report

    if watch and to is not None:
        raise typer.BadParameter("--to is for a search as it is now: leave --watch out")
    if watch:
        follow(run)
    else:
        show_report(run, to)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option(help="New folder.", show_default=False)],
    trial: Annotated[
        int | None, typer.Option(help="Number in the Pareto table; by default the best on validation.", show_default=False)
    ] = None,
    max_density: Annotated[
        float | None, typer.Option(help="Take the best that keeps at most this share of the weights.", show_default=False)
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="Such as slim,onnx: see 'distprune list format'. By default those that need no package.", show_default=False),
    ] = None,
) -> None:
    """Write masks, pruned weights, a stand-alone model, other formats and a manifest of one trial."""
    from distprune.cli.progress import exporting
    from distprune.export.reading import open_export
    from distprune.result import Result

    best = Result(run).best(trial=trial, max_density=max_density)
    folder = best.export(to, formats=None if formats is None else [name.strip() for name in formats.split(",")], listen=exporting)
    print("\n".join(open_export(folder).lines()))
    print(f"trial {best.number} exported to {folder}")


@app.command()
def replay(
    run: RunArgument,
    trial: Annotated[int, typer.Argument(help="Number of a trial.", show_default=False)],
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default where the trial ran.", show_default=False)] = None,
) -> None:
    """Run a trial again from nothing and compare it with its record, bit by bit: exit code 0 if it is the same, 1 if not."""
    from distprune import api
    from distprune.cli.progress import replayed

    outcome = api.replay(run, trial, device=device, listen=replayed)
    print("\n".join(outcome.lines()))
    raise typer.Exit(0 if outcome.same else 1)


@app.command()
def sanity(
    run: Annotated[str, typer.Argument(help="Run folder or its URL, or the folder of an export.", show_default=False)],
    trial: Annotated[
        int | None, typer.Option(help="Number in the Pareto table; by default the best pruned one on validation.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(help="Retrainings of each variant.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    to: Annotated[Path | None, typer.Option(help="Write the numbers to this new JSON file.", show_default=False)] = None,
) -> None:
    """Shuffle, reinitialise and invert a mask, retrain each, and say whether it knows more than layer budgets."""
    from distprune import api
    from distprune.report.sanity import hear, show_sanity

    show_sanity(api.sanity(run, trial=trial, seeds=seeds, device=device, to=to, listen=hear))


@app.command()
def apply(
    masks: Annotated[str, typer.Argument(help="File of masks, export folder, or run folder or its URL.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="Function that returns the network: package.module:function; this folder's too.", show_default=False)
    ],
    weights: Annotated[Path | None, typer.Option(help="Safetensors file of its state.", show_default=False)] = None,
    to: Annotated[Path | None, typer.Option(help="Write the pruned state to this new safetensors file.", show_default=False)] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="What the function is called with: name=value, one each.", show_default=False)
    ] = None,
    trial: Annotated[
        int | None, typer.Option(help="Number in a run's Pareto table; by default the best pruned one.", show_default=False)
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Go on where names or shapes do not match.")] = False,
) -> None:
    """Put masks on a network of your own."""
    from distprune import api
    from distprune.cli.values import named
    from distprune.report.applied import show_applied

    options = named(option or [])
    show_applied(api.apply(masks, model, options=options, weights=weights, to=to, trial=trial, strict=not partial))


@app.command()
def bench(
    export: Annotated[Path, typer.Argument(help="Folder of an export.", show_default=False)],
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,64",
    threads: Annotated[int | None, typer.Option(help="On the processor; by default torch's own number.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    rounds: Annotated[int | None, typer.Option(help="Blocks of each network; by default 30.", show_default=False)] = None,
    to: Annotated[Path | None, typer.Option(help="Write the numbers to this new JSON file.", show_default=False)] = None,
) -> None:
    """Measure the forms of an export beside the dense network, and say whether they are faster."""
    from distprune import api
    from distprune.cli.values import numbers
    from distprune.report.bench import Progress, show_bench

    batches = numbers(batch, "--batch")
    show_bench(api.bench(export, batches=batches, threads=threads, device=device, rounds=rounds, to=to, listen=Progress()))


@app.command()
def dashboard(
    run: RunArgument,
    port: Annotated[int, typer.Option(help="0 for one that is free.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine can look at it.")] = "127.0.0.1",
) -> None:
    """Show the trials of a run in optuna-dashboard, read-only, until Ctrl-C; the search may still be running."""
    from distprune import api

    api.dashboard(run, host=host, port=port)


@app.command()
def submit(
    config: Config,
    address: Head,
    name: Name = None,
    storage: Storage = None,
    trials: Trials = None,
    pip: Pip = None,
    uv: Uv = None,
    follow: Follow = True,
) -> None:
    """Submit a search to a Ray cluster as a job."""
    from distprune.cli import jobs

    environment = jobs.Environment(pip, uv)
    code = jobs.submit(config, address=address, name=name, storage=storage, trials=trials, environment=environment, follow=follow)
    raise typer.Exit(code)


@app.command()
def status(
    address: Head,
    job: Annotated[
        str | None, typer.Argument(help="Job id, as submit printed it; by default all that distprune submitted.", show_default=False)
    ] = None,
) -> None:
    """Show in which state a submitted job is, or all of them."""
    from distprune.cli import jobs

    raise typer.Exit(jobs.status(job, address=address))


@app.command()
def logs(
    job: Job,
    address: Head,
    tail: Annotated[int | None, typer.Option(help="Begin with the last lines, that many.", show_default=False)] = None,
    follow: Follow = True,
) -> None:
    """Show the output of a job. Ctrl-C ends the showing, never the job."""
    from distprune.cli import following

    raise typer.Exit(following.logs(job, address=address, tail=tail, follow=follow))


@app.command()
def stop(job: Job, address: Head) -> None:
    """Stop a job and wait until it has; it can be resumed."""
    from distprune.cli import jobs

    raise typer.Exit(jobs.stop(job, address=address))


@app.command()
def fetch(
    job: Job,
    address: Head,
    to: Annotated[Path, typer.Option(help="Folder that receives the run folder.")] = Path("runs"),
) -> None:
    """Bring the run folder of a submitted search here. A fetch that broke off goes on where it was."""
    from distprune.cli import fetching

    print(f"fetched to {fetching.fetch(job, address=address, to=to)}")
