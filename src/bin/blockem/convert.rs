use std::path::PathBuf;

use blockem::error::Result;
use blockem::latents::Latents;
use clap::Args;

use crate::{Recipe, progress};

/// Write an SAE, whole or only its blocked rows, as one safetensors file
///
/// With --latents the file keeps only those rows, under their ids in the dictionary: a few hundred
/// kilobytes that a trainer can ship. The recipe stands in the file's metadata.
#[derive(Args)]
pub struct Convert {
    /// A file, or the folder in which its owner keeps it
    sae: PathBuf,

    #[arg(value_name = "OUT.safetensors")]
    output: PathBuf,

    /// Keep only the latents of this set
    #[arg(long, value_name = "K0.json")]
    latents: Option<PathBuf>,

    #[command(flatten)]
    recipe: Recipe,
}

impl Convert {
    pub fn run(&self) -> Result<()> {
        let sae = self.recipe.open(&self.sae)?;
        let latents = self.latents.as_ref().map(|path| Latents::open(path, &sae)).transpose()?;
        let ids = latents.as_ref().map(Latents::ids);
        sae.convert(ids, &self.output, &mut progress::bar("convert", true))
    }
}
