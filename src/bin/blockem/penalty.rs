use std::path::PathBuf;

use blockem::error::Result;
use blockem::latents::Latents;
use blockem::penalty_file::penalty_file;
use blockem::plan::{Activation, Plan, PlanOptions};
use blockem::tensor::Device;
use clap::{Args, ValueEnum};

use crate::{Recipe, print, progress};

/// Compute the penalty and its gradient for hidden states in a safetensors file
///
/// IN holds hidden [T, d] (f32, f16 or bf16), reference_hidden [T, d] or reference [T, K], and
/// optionally mask [T]. OUT gets latents and reference [T, K] f32, loss_sum and token_count [1]
/// f64, latent_loss [K] f64 and grad_hidden [T, d] f32. Columns are K_pos then K_neg, in the
/// file's order.
#[derive(Args)]
pub struct Penalty {
    /// A file, or the folder in which its owner keeps it
    #[arg(long)]
    sae: PathBuf,

    /// The blocked latents: {"K_pos": [ids], "K_neg": [ids], "weights": {"<id>": w}}
    #[arg(long, value_name = "K0.json")]
    latents: PathBuf,

    #[arg(long, value_name = "IN.safetensors")]
    input: PathBuf,

    #[arg(long, value_name = "OUT.safetensors")]
    output: PathBuf,

    /// From pre-activation to latent: the file's rule, relu without threshold or top-k, or no gate
    #[arg(long, value_enum, default_value_t)]
    activation: Rule,

    /// Multiplies grad_hidden
    #[arg(long, value_name = "F", default_value_t = 1.0, allow_negative_numbers = true)]
    scale: f64,

    /// Where to compute: cpu or cuda:N
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,

    #[command(flatten)]
    recipe: Recipe,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Rule {
    #[default]
    Native,
    #[value(alias = "dense_relu")]
    DenseRelu,
    Preactivation,
}

impl Penalty {
    pub fn run(&self) -> Result<()> {
        let sae = self.recipe.open(&self.sae)?;
        let latents = Latents::open(&self.latents, &sae)?;
        let activation = match self.activation {
            Rule::Native => Activation::Native,
            Rule::DenseRelu => Activation::DenseRelu,
            Rule::Preactivation => Activation::Preactivation,
        };
        let options = PlanOptions { device: self.device, activation, ..PlanOptions::default() };
        let plan = Plan::new(&sae, &latents, &options)?;
        let mut progress = progress::bar("tokens", false);
        let totals = penalty_file(&plan, &self.input, &self.output, self.scale, &mut progress)?;
        print(&format!(
            "activation   {}\nlatents      {} ({} up, {} down)\nidentity     {}\n\
             loss_sum     {}\ntoken_count  {}\n",
            plan.activation().name(),
            plan.num_latents(),
            plan.num_positive(),
            plan.num_latents() - plan.num_positive(),
            plan.identity(),
            totals.loss_sum,
            totals.token_count,
        ))
    }
}

fn device(text: &str) -> std::result::Result<Device, String> {
    match text.split_once(':') {
        None if text == "cpu" => Ok(Device::Cpu),
        None if text == "cuda" => Ok(Device::Cuda(0)),
        Some(("cuda", index)) => match index.parse::<u16>() {
            Ok(index) => Ok(Device::Cuda(index.into())),
            Err(_) => Err(format!("{index:?} is not a device number")),
        },
        _ => Err("must be cpu or cuda:N".into()),
    }
}
