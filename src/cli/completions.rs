//! `bootcache completions SHELL`.

use std::process::ExitCode;

use clap::CommandFactory;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell to complete for
    shell: clap_complete::Shell,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // Its own writing to stdout would panic when nobody reads: `print!` is looked after in `main`.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "bootcache", &mut script);
    print!("{}", String::from_utf8_lossy(&script));
    Ok(ExitCode::SUCCESS)
}
