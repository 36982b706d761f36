//! The command line: parse, set up logging, run, print the error chain once.

mod cli;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

/// What a shell says of a program that wrote to a pipe which nobody reads.
const CLOSED_PIPE: i32 = 128 + 13;

fn main() -> ExitCode {
    end_when_stdout_cannot_be_written();
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

/// `print!` panics when stdout cannot be written. That its reader has gone, as `head` does, is no fault of ours. The
/// signal that ends other programs then stays ignored: it would also end a daemon whose client has gone. Anything else,
/// such as a full disk, is an error like others.
fn end_when_stdout_cannot_be_written() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let what = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        let Some(error) = what.strip_prefix("failed printing to stdout: ") else { return report(panic) };
        if error.contains("Broken pipe") {
            std::process::exit(CLOSED_PIPE);
        }
        eprintln!("bootcache: cannot write to stdout: {error}");
        std::process::exit(1);
    }));
}
