//! The command line: parse, set up logging, run, print the error chain once.

mod cli;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

fn main() -> ExitCode {
    let arguments = match cli::Cli::try_parse() {
        Ok(arguments) => arguments,
        // What is wrong with a value is all there is to say.
        Err(error) if error.kind() == ErrorKind::ValueValidation => {
            let said = error.to_string();
            let what = said.lines().next().unwrap_or_default();
            eprintln!("bootcache: {}", what.trim_start_matches("error: "));
            return ExitCode::from(2);
        }
        Err(error) => error.exit(),
    };
    cli::set_up_logging(arguments.verbose);
    match cli::run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bootcache: {}", cli::complaint(&error));
            ExitCode::FAILURE
        }
    }
}
