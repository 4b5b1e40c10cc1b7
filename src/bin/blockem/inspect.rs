use std::path::PathBuf;

use blockem::error::Result;
use clap::Args;
use serde_json::{Value, json};

use crate::{Recipe, print, progress};

/// Print how an SAE is read: its resolved recipe
#[derive(Args)]
pub struct Inspect {
    /// A file, or the folder in which its owner keeps it
    sae: PathBuf,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Also read the whole weights file and print its sha256
    #[arg(long)]
    sha256: bool,

    #[command(flatten)]
    recipe: Recipe,
}

impl Inspect {
    pub fn run(&self) -> Result<()> {
        let sae = self.recipe.open(&self.sae)?;
        let mut recipe = sae.describe()?;
        recipe["decoder_norms"] = sae.decoder_norms()?;
        if self.sha256 {
            recipe["sha256"] = json!(sae.file_sha256(&mut progress::bar("sha256", true))?);
        }
        if self.json {
            return print(&format!("{recipe:#}\n"));
        }
        let Value::Object(recipe) = recipe else { return Ok(()) };
        let width = recipe.keys().map(String::len).max().unwrap_or(0);
        let lines = recipe.iter().map(|(key, value)| format!("{key:width$}  {}\n", plain(value)));
        print(&lines.collect::<String>())
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Object(map) => {
            let parts: Vec<String> = map.iter().map(|(k, v)| format!("{k} {}", plain(v))).collect();
            parts.join(", ")
        }
        other => other.to_string(),
    }
}
