//! Plans: the rows of one latent set, gathered from one SAE, ready on one device.

use sha2::{Digest, Sha256};

use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Cuda};
use crate::backend::reference::Reference;
use crate::backend::{Backend, OwnedGate, OwnedRows};
use crate::error::{Result, bail};
use crate::latents::Latents;
use crate::sae::{Architecture, EncoderRows, Sae};
use crate::tensor::Device;

/// From pre-activation to latent: the file's rule, or one of the two that BLOCK-EM's users choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Activation {
    /// The rule of the file, as its owner's library loads it.
    #[default]
    Native = 0,
    /// relu of the pre-activation: no threshold, no top-k. What BLOCK-EM's authors use.
    DenseRelu = 1,
    /// The pre-activation itself: no gate, so no dead zone.
    Preactivation = 2,
}

impl Activation {
    pub fn from_code(code: i32) -> Option<Activation> {
        use Activation::*;
        [Native, DenseRelu, Preactivation].into_iter().find(|a| *a as i32 == code)
    }

    pub fn name(self) -> &'static str {
        match self {
            Activation::Native => "native",
            Activation::DenseRelu => "dense_relu",
            Activation::Preactivation => "preactivation",
        }
    }
}

/// Who computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum BackendKind {
    /// The device's own.
    #[default]
    Auto = 0,
    Cpu = 1,
    Cuda = 2,
    /// The f64 oracle; also takes f64 tensors. Slow.
    Reference = 3,
}

impl BackendKind {
    pub fn from_code(code: i32) -> Option<BackendKind> {
        use BackendKind::*;
        [Auto, Cpu, Cuda, Reference].into_iter().find(|b| *b as i32 == code)
    }
}

/// How a plan is made.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions {
    pub device: Device,
    pub backend: BackendKind,
    pub activation: Activation,
    /// CPU worker threads of a run call; 0 means one for each available core.
    pub num_threads: usize,
}

impl Default for PlanOptions {
    fn default() -> PlanOptions {
        PlanOptions {
            device: Device::Cpu,
            backend: BackendKind::Auto,
            activation: Activation::Native,
            num_threads: 0,
        }
    }
}

/// SAE × latent set × device. Never changes after creation: any thread may use it.
pub struct Plan {
    pub(crate) backend: Box<dyn Backend>,
    kind: BackendKind,
    device: Device,
    activation: Activation,
    d_in: usize,
    d_sae: usize,
    num_latents: usize,
    num_positive: usize,
    layer: Option<i64>,
    columns: Columns,
    identity: String,
}

impl Plan {
    pub fn new(sae: &Sae, latents: &Latents, options: &PlanOptions) -> Result<Plan> {
        let kind = resolve_backend(options.device, options.backend)?;
        latents.check_against(sae)?;
        refuse_native_topk(sae, options.activation)?;
        let encoder = sae.gather(latents.ids())?;
        let columns = Columns::new(sae, latents, &encoder, options.activation);
        let identity = columns.identity(0..latents.len());
        check_provenance(latents, &identity, options.activation)?;
        let rows = latent_rows(encoder, latents, sae.recipe().architecture, options.activation);
        let backend: Box<dyn Backend> = match kind {
            BackendKind::Reference => Box::new(Reference::new(rows)),
            BackendKind::Cuda => Box::new(Cuda::new(&rows.borrow(), cuda_index(options.device))?),
            BackendKind::Auto | BackendKind::Cpu => {
                Box::new(Cpu::new(&rows.borrow(), options.num_threads))
            }
        };
        Ok(Plan {
            backend,
            kind,
            device: options.device,
            activation: options.activation,
            d_in: sae.recipe().d_in,
            d_sae: sae.recipe().d_sae,
            num_latents: latents.len(),
            num_positive: latents.signs().iter().filter(|s| **s > 0).count(),
            layer: sae.recipe().layer,
            columns,
            identity,
        })
    }

    pub fn d_in(&self) -> usize {
        self.d_in
    }

    pub fn d_sae(&self) -> usize {
        self.d_sae
    }

    /// K
    pub fn num_latents(&self) -> usize {
        self.num_latents
    }

    /// How many of them have sign +1.
    pub fn num_positive(&self) -> usize {
        self.num_positive
    }

    pub fn device(&self) -> Device {
        self.device
    }

    pub fn backend(&self) -> BackendKind {
        self.kind
    }

    pub fn activation(&self) -> Activation {
        self.activation
    }

    pub fn layer(&self) -> Option<i64> {
        self.layer
    }

    /// Worker threads of a run call.
    pub fn num_threads(&self) -> usize {
        self.backend.num_threads()
    }

    /// sha256 of all that z depends on: rows, recipe, activation, d, F. Signs and weights are not
    /// in it, since they do not change z.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The identity that a plan of these latents has when they are read back from a file, which
    /// holds K_pos before K_neg.
    pub fn identity_in_file(&self) -> String {
        let side = |sign| (0..self.num_latents).filter(move |k| self.columns.signs[*k] == sign);
        self.columns.identity(side(1).chain(side(-1)))
    }

    /// Ids in the dictionary, in column order.
    pub fn latent_ids(&self) -> &[u64] {
        &self.columns.ids
    }

    /// sha256 of all that z of column k depends on but the numerics: its row, id, recipe,
    /// activation, d, F. Plans that share the latent share the digest.
    pub fn column_digest(&self, k: usize) -> [u8; 32] {
        self.columns.digest(k)
    }

    /// Names the arithmetic: equal names give equal z, bit for bit.
    pub fn numerics(&self) -> String {
        self.backend.numerics()
    }

    /// Bytes of scratch that the penalty calls need for so many tokens.
    pub fn workspace_size(&self, tokens: usize) -> usize {
        self.backend.workspace_size(tokens)
    }
}

/// The backend that serves a device, or why none does.
pub(crate) fn resolve_backend(device: Device, backend: BackendKind) -> Result<BackendKind> {
    match (device, backend) {
        (Device::Cpu, BackendKind::Auto) => Ok(BackendKind::Cpu),
        (Device::Cpu, BackendKind::Cpu | BackendKind::Reference) => Ok(backend),
        (Device::Cuda(_), BackendKind::Auto | BackendKind::Cuda) => {
            cuda::check_available()?;
            Ok(BackendKind::Cuda)
        }
        (Device::Cpu, BackendKind::Cuda) => {
            cuda::check_available()?;
            bail!(InvalidArgument, "the CUDA backend needs a CUDA device, not the CPU")
        }
        (Device::Cuda(index), BackendKind::Cpu | BackendKind::Reference) => {
            bail!(InvalidArgument, "the backend chosen runs on the CPU, not on cuda:{index}")
        }
    }
}

/// The number of a device that [`resolve_backend`] found to be CUDA's.
fn cuda_index(device: Device) -> i32 {
    match device {
        Device::Cuda(index) => index,
        Device::Cpu => unreachable!("resolved: the CUDA backend has a CUDA device"),
    }
}

/// A top-k over the blocked rows alone would be another function than the SAE's.
fn refuse_native_topk(sae: &Sae, activation: Activation) -> Result<()> {
    if sae.recipe().architecture == Architecture::TopK && activation == Activation::Native {
        bail!(
            Unsupported,
            "the activation 'native' of a topk SAE needs every latent of the dictionary, which \
             this version does not compute; use 'dense_relu' (what BLOCK-EM's authors use) or \
             'preactivation'"
        );
    }
    Ok(())
}

fn check_provenance(latents: &Latents, identity: &str, activation: Activation) -> Result<()> {
    let Some(made_for) = latents.provenance() else { return Ok(()) };
    if made_for.activation != activation.name() {
        bail!(
            ProvenanceMismatch,
            "the latent set was saved for the activation '{}', the plan asks for '{}'; make the \
             plan with the former, or remove the key \"blockem\" from the file",
            made_for.activation,
            activation.name()
        );
    }
    if made_for.identity != identity {
        bail!(
            ProvenanceMismatch,
            "the latent set was saved for another SAE (identity {}, this one gives {identity}); \
             open the SAE it belongs to, or remove the key \"blockem\" from the file",
            made_for.identity
        );
    }
    Ok(())
}

/// Digests of all that z depends on, by column, so that the identity of the same latents in another
/// order is known too.
struct Columns {
    recipe: Vec<u8>,
    ids: Vec<u64>,
    signs: Vec<i8>,
    rows: Vec<[u8; 32]>,
}

impl Columns {
    fn new(sae: &Sae, latents: &Latents, rows: &EncoderRows, activation: Activation) -> Columns {
        let r = sae.recipe();
        let hook = r.hook.as_deref().unwrap_or("");
        let mut recipe = Vec::new();
        for text in ["blockem identity 1", r.architecture.name(), activation.name(), hook] {
            recipe.extend((text.len() as u64).to_le_bytes());
            recipe.extend(text.as_bytes());
        }
        for n in [r.d_in, r.d_sae] {
            recipe.extend((n as u64).to_le_bytes());
        }
        Columns {
            recipe,
            ids: latents.ids().to_vec(),
            signs: latents.signs().to_vec(),
            rows: (0..latents.len()).map(|k| row_digest(rows, k)).collect(),
        }
    }

    fn identity(&self, order: impl IntoIterator<Item = usize>) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.recipe);
        hash.update((self.ids.len() as u64).to_le_bytes());
        for k in order {
            hash.update(self.ids[k].to_le_bytes());
            hash.update(self.rows[k]);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn digest(&self, k: usize) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"blockem column 1");
        hash.update(&self.recipe);
        hash.update(self.ids[k].to_le_bytes());
        hash.update(self.rows[k]);
        hash.finalize().into()
    }
}

fn row_digest(rows: &EncoderRows, k: usize) -> [u8; 32] {
    let gate = rows.gate.as_ref();
    let at = |values: &Vec<f32>| values[k];
    let numbers = [
        Some(rows.bias[k]),
        rows.threshold.as_ref().map(at),
        gate.map(|g| g.bias[k]),
        gate.map(|g| g.scale[k]),
    ];
    let weights = &rows.weight[k * rows.d_in..][..rows.d_in];
    let mut bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    for number in numbers {
        bytes.push(number.is_some() as u8);
        bytes.extend(number.unwrap_or(0.0).to_le_bytes());
    }
    Sha256::digest(&bytes).into()
}

/// Rows with the gate that the activation chose, and the signs and weights of the set.
fn latent_rows(
    rows: EncoderRows,
    latents: &Latents,
    architecture: Architecture,
    activation: Activation,
) -> OwnedRows {
    let zeros = vec![0.0; rows.bias.len()];
    let (gate_bias, scale) = rows.gate.map(|g| (g.bias, g.scale)).unzip();
    let gate = match (activation, architecture) {
        (Activation::Preactivation, _) => OwnedGate::Open,
        (Activation::Native, Architecture::JumpRelu) => {
            OwnedGate::Threshold(rows.threshold.unwrap_or(zeros))
        }
        (Activation::Native, Architecture::Gated) => OwnedGate::Gated(gate_bias.unwrap_or(zeros)),
        _ => OwnedGate::Relu,
    };
    let signed = latents.signs().iter().zip(latents.weights());
    OwnedRows {
        d_in: rows.d_in,
        weight: rows.weight,
        bias: rows.bias,
        scale,
        gate,
        sign_weight: signed.map(|(s, w)| *s as f32 * w).collect(),
    }
}
