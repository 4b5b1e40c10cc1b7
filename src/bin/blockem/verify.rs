use std::path::PathBuf;

use blockem::error::{Error, Result, Status};
use blockem::verify::{VerifyOptions, report_lines, verify};
use clap::Args;

use crate::{Recipe, positive, print, progress};

/// Measure whether an SAE fits hidden states: mean L0, explained variance, dead and dense latents
///
/// H holds hidden [T, d] or [B, S, d] (f32, f16 or bf16), the residual stream or whatever the SAE
/// reads; optionally mask and positions [T] or [B, S] (position 0 is a sequence's first token),
/// output (what a transcoder predicts), and hidden_states.N: the same tokens at other indices of
/// Hugging Face's hidden_states, to find the layer of an SAE that reads block boundaries. Some tokens
/// are encoded again as if the file meant something else (a scale, b_dec, thresholds, top-k); what
/// fits better is flagged.
#[derive(Args)]
pub struct Verify {
    /// A file, or the folder in which its owner keeps it
    sae: PathBuf,

    #[arg(long, value_name = "H.safetensors")]
    hidden: PathBuf,

    /// Active latents per token, as the SAE's page states them
    #[arg(long, value_name = "F", value_parser = positive)]
    expected_l0: Option<f64>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Exit with 1 if anything is flagged
    #[arg(long)]
    strict: bool,

    #[command(flatten)]
    recipe: Recipe,
}

impl Verify {
    pub fn run(&self) -> Result<()> {
        let sae = self.recipe.open(&self.sae)?;
        let options = VerifyOptions { expected_l0: self.expected_l0 };
        let mut bar = progress::bar("verify", true);
        let report = verify(&sae, &self.hidden, &options, &mut bar)?;
        match self.json {
            true => print(&format!("{report:#}\n"))?,
            false => print(&report_lines(&report))?,
        }
        let flags = report["flags"].as_array().into_iter().flatten();
        let names: Vec<&str> = flags.filter_map(|flag| flag["flag"].as_str()).collect();
        if self.strict && !names.is_empty() {
            let text = format!("{}: flagged: {}", self.sae.display(), names.join(", "));
            return Err(Error::new(Status::Format, text));
        }
        Ok(())
    }
}
