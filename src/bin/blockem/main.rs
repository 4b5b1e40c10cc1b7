//! The command line: each command in a file of its own, on the library's public interface.

mod convert;
mod inspect;
mod penalty;
mod progress;
mod verify;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use blockem::error::{Error, Result, Status};
use blockem::sae::{Sae, SaeOptions};
use clap::{Args, Parser, Subcommand};
use serde_json::{Map, Value};

/// Block emergent misalignment while fine-tuning: inspect and verify sparse autoencoders, compute the
/// BLOCK-EM penalty and its gradient, cut dictionaries down to the blocked rows.
///
/// Exit status: 0; 1 with one line on standard error when the input is at fault; 2 on wrong usage.
#[derive(Parser)]
#[command(name = "blockem", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Inspect(inspect::Inspect),
    Penalty(penalty::Penalty),
    Convert(convert::Convert),
    Verify(verify::Verify),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Inspect(command) => command.run(),
        Command::Penalty(command) => command.run(),
        Command::Convert(command) => command.run(),
        Command::Verify(command) => command.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A message may quote a file: keep it one line.
            let line = error.message.replace(['\n', '\r'], " ");
            let _ = writeln!(io::stderr(), "blockem: {line}");
            ExitCode::from(1)
        }
    }
}

/// What an SAE's file may not say; the same for every command.
#[derive(Args)]
struct Recipe {
    /// Configuration keys that complete or override the file's own: a JSON object by SAELens'
    /// names, or a file that holds one
    #[arg(long, value_name = "JSON|FILE")]
    recipe: Option<String>,

    /// sqrt(d) / mean norm of the hidden states, for a file that needs a scale and lacks it
    #[arg(long, value_name = "F", value_parser = positive)]
    input_scale: Option<f64>,
}

impl Recipe {
    fn open(&self, path: &Path) -> Result<Sae> {
        let recipe = self.recipe.as_deref().map(read_recipe).transpose()?;
        Sae::open(path, &SaeOptions { recipe, input_scale: self.input_scale })
    }
}

fn read_recipe(given: &str) -> Result<Map<String, Value>> {
    let text = match given.trim_start().starts_with('{') {
        true => given.as_bytes().to_vec(),
        false => {
            std::fs::read(given).map_err(|e| Error::io(Path::new(given), "read the recipe", &e))?
        }
    };
    match blockem::json::parse(&text) {
        Ok(Value::Object(recipe)) => Ok(recipe),
        Ok(_) => Err(Error::new(Status::Format, "--recipe: not a JSON object")),
        Err(reason) => Err(Error::new(Status::Format, format!("--recipe: {reason}"))),
    }
}

fn positive(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("must be a positive number".into()),
    }
}

/// Prints to standard output; a closed pipe ends the program quietly.
fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::io(&PathBuf::from("standard output"), "write", &e))
        }
        _ => Ok(()),
    }
}
