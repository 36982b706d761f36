//! The command line: parse, set up logging, run, print the error chain once.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cli::Cli::parse();
    cli::set_up_logging(arguments.verbose);
    match cli::run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bootcache: {}", cli::complaint(&error));
            ExitCode::FAILURE
        }
    }
}
