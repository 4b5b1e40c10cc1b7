//! Plans: the rows of one latent set, gathered from one SAE, ready on one device.

use std::cell::RefCell;
use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Cuda};
use crate::backend::reference::Reference;
use crate::backend::{Backend, OwnedGate, OwnedRows, TopK, side_by_side};
use crate::error::{Result, bail};
use crate::latents::Latents;
use crate::sae::{Architecture, EncoderRows, Recipe, Sae, Selection, Site, TokenNorm};
use crate::tensor::{Device, Stream};

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

/// What of z a plan computes: all of it, or one of two steps where the columns of hidden lie on
/// several processes (tensor parallelism). The processes add up what [`Part::Columns`] encodes; the
/// sums [T, K] take the place of hidden in calls of [`Part::Gate`]; their gradient takes the place of
/// coef in [`Part::Columns`]' backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    #[default]
    Whole,
    /// W · h over these columns, without bias and gate.
    Columns { begin: usize, end: usize },
    /// From W · h on: bias, gate and penalty.
    Gate,
}

/// How a plan is made.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions {
    pub device: Device,
    pub backend: BackendKind,
    pub activation: Activation,
    /// CPU worker threads of a run call; 0 means one for each available core.
    pub num_threads: usize,
    pub part: Part,
}

impl Default for PlanOptions {
    fn default() -> PlanOptions {
        PlanOptions {
            device: Device::Cpu,
            backend: BackendKind::Auto,
            activation: Activation::Native,
            num_threads: 0,
            part: Part::Whole,
        }
    }
}

/// SAE × latent set × device. Never changes after creation: any thread may use it.
pub struct Plan {
    pub(crate) backend: Box<dyn Backend>,
    kind: BackendKind,
    device: Device,
    activation: Activation,
    part: Part,
    d_in: usize,
    d_sae: usize,
    num_latents: usize,
    num_positive: usize,
    site: Site,
    hook: Option<String>,
    layer: Option<i64>,
    /// The gate is TopK's.
    has_topk: bool,
    token_norm: TokenNorm,
    glu: bool,
    columns: Columns,
    identity: String,
}

impl Plan {
    pub fn new(sae: &Sae, latents: &Latents, options: &PlanOptions) -> Result<Plan> {
        let kind = resolve_backend(options.device, options.backend)?;
        latents.check_against(sae)?;
        check_part(options.part, sae.recipe(), latents.len(), options.activation)?;
        let contest = match (sae.recipe().architecture, options.activation) {
            (Architecture::TopK, Activation::Native) => Some(Contest::new(sae, latents.ids())?),
            _ => None,
        };
        let encoder = sae.gather(latents.ids())?;
        let mut columns = Columns::new(sae, latents, &encoder, options.activation);
        let topk = contest.as_ref().map(|contest| contest.gate.clone());
        let rows = latent_rows(encoder, latents, sae.recipe(), options.activation, topk);
        let rows = part_of(rows, options.part);
        let d_in = rows.d_in;
        let read = |range| contest.as_ref().map_or(Ok(EncoderRows::default()), |c| c.read(range));
        let backend: Box<dyn Backend> = match kind {
            BackendKind::Reference => Box::new(Reference::new(rows, &read)?),
            BackendKind::Cuda => {
                Box::new(Cuda::new(&rows.borrow(), &read, cuda_index(options.device))?)
            }
            BackendKind::Auto | BackendKind::Cpu => {
                Box::new(Cpu::new(&rows.borrow(), &read, options.num_threads)?)
            }
        };
        let has_topk = contest.is_some();
        if let Some(contest) = contest {
            columns.compete(contest);
        }
        let whole = columns.identity(0..latents.len());
        check_provenance(latents, &whole, options.activation)?;
        columns.recipe.extend(part_name(options.part).into_bytes());
        let identity = columns.identity(0..latents.len());
        Ok(Plan {
            backend,
            kind,
            device: options.device,
            activation: options.activation,
            part: options.part,
            d_in,
            d_sae: sae.recipe().d_sae,
            num_latents: latents.len(),
            num_positive: latents.signs().iter().filter(|s| **s > 0).count(),
            site: sae.recipe().site,
            hook: sae.recipe().hook.clone(),
            layer: sae.recipe().layer,
            has_topk,
            token_norm: sae.recipe().token_norm,
            glu: sae.recipe().glu,
            columns,
            identity,
        })
    }

    /// Columns of hidden.
    pub fn d_in(&self) -> usize {
        self.d_in
    }

    pub fn part(&self) -> Part {
        self.part
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

    /// Where the SAE reads.
    pub fn site(&self) -> Site {
        self.site
    }

    /// The name of that place in the SAE's file.
    pub fn hook(&self) -> Option<&str> {
        self.hook.as_deref()
    }

    /// 0-based decoder block in which the site lies.
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

    /// In column order.
    pub fn signs(&self) -> &[i8] {
        &self.columns.signs
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

    /// [`Plan::encode`] needs a workspace: latents are chosen among all of the dictionary, a second
    /// encoder gates them, or a CUDA device normalises every token first.
    pub fn encode_needs_workspace(&self) -> bool {
        let normed = self.token_norm != TokenNorm::None;
        self.has_topk || self.glu || (normed && self.kind == BackendKind::Cuda)
    }

    /// [`Plan::backward`] needs hidden and a workspace: every token is normalised, or a second
    /// encoder gates the latents.
    pub fn backward_needs_hidden(&self) -> bool {
        self.token_norm != TokenNorm::None || self.glu
    }

    /// Whether work that is put on a CUDA stream runs on the plan's device, in its context.
    pub(crate) fn owns_stream(&self, stream: Stream) -> Result<bool> {
        self.backend.owns_stream(stream)
    }

    /// Bytes of scratch that the penalty calls need for so many tokens, and the others where they
    /// need any.
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
pub(crate) fn cuda_index(device: Device) -> i32 {
    match device {
        Device::Cuda(index) => index,
        Device::Cpu => unreachable!("resolved: the CUDA backend has a CUDA device"),
    }
}

/// A TopK SAE under its own rule: a top-k over the blocked rows alone would be another function.
pub(crate) struct Contest<'a> {
    sae: &'a Sae,
    pub gate: TopK,
    /// Where the rivals of each group begin in the dictionary.
    starts: Vec<usize>,
    /// How many rivals have been seen, and what of each group.
    seen: RefCell<(usize, Vec<Sha256>)>,
}

impl Contest<'_> {
    pub fn new<'a>(sae: &'a Sae, latents: &[u64]) -> Result<Contest<'a>> {
        let recipe = sae.recipe();
        let (Some(k), false) = (recipe.k, recipe.selection == Selection::Batch) else {
            bail!(
                Unsupported,
                "the activation 'native' of this SAE keeps the largest latents of a whole batch, so \
                 a token's would depend on the other tokens; use 'dense_relu' (what BLOCK-EM's \
                 authors use) or 'preactivation'"
            );
        };
        if let Some(stored) = sae.stored_latents() {
            bail!(
                Unsupported,
                "the activation 'native' of a topk SAE needs every latent of the dictionary; this \
                 partial file holds {stored} of {}. Open the whole SAE, or use 'dense_relu' (what \
                 BLOCK-EM's authors use) or 'preactivation'",
                recipe.d_sae
            );
        }
        let (size, winners) = match recipe.selection {
            Selection::Groups => (recipe.d_sae / k, 1),
            _ => (recipe.d_sae, k),
        };
        let group_of = |id: &u64| *id as usize / size;
        let mut groups: Vec<usize> = latents.iter().map(group_of).collect();
        groups.sort_unstable();
        groups.dedup();
        let column = |id| groups.binary_search(&group_of(id)).unwrap_or_default() as u32;
        let gate = TopK {
            k: winners,
            group: latents.iter().map(column).collect(),
            group_ends: (1..=groups.len()).map(|g| g * size).collect(),
            by_magnitude: recipe.selection == Selection::Magnitude,
            // Comes with the blocked latents' rows.
            gain: None,
        };
        let starts: Vec<usize> = groups.into_iter().map(|group| group * size).collect();
        let seen = RefCell::new((0, vec![Sha256::new(); starts.len()]));
        Ok(Contest { sae, gate, starts, seen })
    }

    /// Rows of rivals, each of which is read once, in order.
    fn read(&self, rivals: Range<usize>) -> Result<EncoderRows> {
        let size = self.gate.group_ends[0];
        let ids: Vec<u64> =
            rivals.map(|rival| (self.starts[rival / size] + rival % size) as u64).collect();
        let rows = self.sae.gather(&ids)?;
        self.seen(&rows);
        Ok(rows)
    }

    /// Enters rivals into the digests, each once, in order.
    pub fn seen(&self, rows: &EncoderRows) {
        let (seen, groups) = &mut *self.seen.borrow_mut();
        for k in 0..rows.bias.len() {
            groups[*seen / self.gate.group_ends[0]].update(row_digest(rows, k));
            *seen += 1;
        }
    }

    /// Of all that decides which latents of each group are on.
    fn digests(self) -> Vec<[u8; 32]> {
        let rule = [self.gate.k as u64, self.gate.by_magnitude as u64].map(u64::to_le_bytes);
        let (_, groups) = self.seen.into_inner();
        groups.into_iter().map(|hash| hash.chain_update(rule.concat()).finalize().into()).collect()
    }
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

/// Whether z of an SAE can be computed in two steps, and the columns exist.
fn check_part(part: Part, recipe: &Recipe, count: usize, activation: Activation) -> Result<()> {
    if part == Part::Whole {
        return Ok(());
    }
    if recipe.token_norm != TokenNorm::None {
        bail!(
            Unsupported,
            "this SAE normalises every token ({}), which takes all columns of hidden: gather them \
             and use a whole plan",
            recipe.token_norm.name()
        );
    }
    if recipe.glu {
        bail!(
            Unsupported,
            "this SAE has a GLU encoder, whose two products are not added up but multiplied: gather \
             hidden and use a whole plan"
        );
    }
    if recipe.architecture == Architecture::TopK && activation == Activation::Native {
        bail!(
            Unsupported,
            "the activation 'native' of a topk SAE compares the whole dictionary, which no part of \
             a plan does; use 'dense_relu' or 'preactivation', or gather hidden for a whole plan"
        );
    }
    match part {
        Part::Columns { begin, end } if begin >= end || end > recipe.d_in => bail!(
            InvalidArgument,
            "the columns {begin} to {end} are none of the SAE's: it has {}",
            recipe.d_in
        ),
        Part::Gate if count > MOST_GATED => bail!(
            Unsupported,
            "the part GATE keeps K x K numbers, and serves up to {MOST_GATED} latents, not {count}"
        ),
        _ => Ok(()),
    }
}

/// Whose one-hot rows take 1 GiB.
const MOST_GATED: usize = 1 << 14;

/// The rows with which a backend computes the part.
fn part_of(rows: OwnedRows, part: Part) -> OwnedRows {
    let count = rows.bias.len();
    match part {
        Part::Whole => rows,
        Part::Columns { begin, end } => {
            let columns = rows.weight.chunks_exact(rows.d_in).flat_map(|row| &row[begin..end]);
            OwnedRows {
                d_in: end - begin,
                weight: columns.copied().collect(),
                bias: vec![0.0; count],
                scale: None,
                gate: OwnedGate::Open,
                ..rows
            }
        }
        // A product with one-hot rows copies W · h, to the last bit.
        Part::Gate => {
            let one_hot = |i: usize| if i.is_multiple_of(count + 1) { 1.0 } else { 0.0 };
            OwnedRows { d_in: count, weight: (0..count * count).map(one_hot).collect(), ..rows }
        }
    }
}

/// What the identity of a part has beyond that of the whole plan.
fn part_name(part: Part) -> String {
    match part {
        Part::Whole => String::new(),
        Part::Columns { begin, end } => format!("columns {begin}..{end}"),
        Part::Gate => "gate".into(),
    }
}

/// Digests of all that z depends on, by column, so that the identity of the same latents in another
/// order is known too.
pub(crate) struct Columns {
    pub recipe: Vec<u8>,
    pub ids: Vec<u64>,
    signs: Vec<i8>,
    pub rows: Vec<[u8; 32]>,
}

impl Columns {
    fn new(sae: &Sae, latents: &Latents, rows: &EncoderRows, activation: Activation) -> Columns {
        let signs = latents.signs().to_vec();
        let mut columns = Columns { signs, ..Columns::none(sae, activation) };
        columns.add(latents.ids(), rows);
        columns
    }

    pub fn none(sae: &Sae, activation: Activation) -> Columns {
        let r = sae.recipe();
        let hook = r.hook.as_deref().unwrap_or("");
        let mut recipe = Vec::new();
        let norm = match r.token_norm {
            TokenNorm::None => None,
            norm => Some(norm.name()),
        };
        // What reads blocks' outputs has the identity that it had before other sites were known.
        let site = match r.site {
            Site::Unknown | Site::BlockOutput => None,
            site => Some(site.name()),
        };
        let texts = ["blockem identity 1", r.architecture.name(), activation.name(), hook];
        for text in texts.into_iter().chain(norm).chain(site) {
            recipe.extend((text.len() as u64).to_le_bytes());
            recipe.extend(text.as_bytes());
        }
        for n in [r.d_in, r.d_sae] {
            recipe.extend((n as u64).to_le_bytes());
        }
        Columns { recipe, ids: Vec::new(), signs: Vec::new(), rows: Vec::new() }
    }

    pub fn add(&mut self, ids: &[u64], rows: &EncoderRows) {
        self.ids.extend(ids);
        self.rows.extend((0..ids.len()).map(|k| row_digest(rows, k)));
    }

    /// Enters what decides which of them are on, a latent's own group alone: a set that grows by
    /// latents of other groups keeps the digests of those that it has.
    pub fn compete(&mut self, contest: Contest<'_>) {
        let group_of = contest.gate.group.clone();
        let groups = contest.digests();
        for (row, group) in self.rows.iter_mut().zip(group_of) {
            let hash = Sha256::new().chain_update(*row).chain_update(groups[group as usize]);
            *row = hash.finalize().into();
        }
    }

    pub fn identity(&self, order: impl IntoIterator<Item = usize>) -> String {
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
    let gain = rows.rank_gain.as_ref().map(at);
    let weights = &rows.weight[k * rows.d_in..][..rows.d_in];
    let mut bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    for number in numbers {
        bytes.push(number.is_some() as u8);
        bytes.extend(number.unwrap_or(0.0).to_le_bytes());
    }
    bytes.extend(gain.into_iter().flat_map(f32::to_le_bytes));
    if let Some(glu) = &rows.glu {
        let weights = &glu.weight[k * rows.d_in..][..rows.d_in];
        bytes.extend(b"glu");
        bytes.extend([glu.bias[k]].iter().chain(weights).flat_map(|w| w.to_le_bytes()));
    }
    Sha256::digest(&bytes).into()
}

/// Rows with the gate that the activation chose, and the signs and weights of the set.
fn latent_rows(
    rows: EncoderRows,
    latents: &Latents,
    recipe: &Recipe,
    activation: Activation,
    topk: Option<TopK>,
) -> OwnedRows {
    let signed = latents.signs().iter().zip(latents.weights());
    let sign_weight = signed.map(|(s, w)| *s as f32 * w).collect();
    OwnedRows { sign_weight, ..gated_rows(rows, recipe, activation, topk) }
}

/// Rows with the gate that the activation chose, each with sign and weight 1.
pub(crate) fn gated_rows(
    rows: EncoderRows,
    recipe: &Recipe,
    activation: Activation,
    topk: Option<TopK>,
) -> OwnedRows {
    let zeros = vec![0.0; rows.bias.len()];
    let (gate_bias, scale) = rows.gate.map(|g| (g.bias, g.scale)).unzip();
    let gate = match (activation, recipe.architecture, topk) {
        (Activation::Preactivation, ..) => OwnedGate::Open,
        (Activation::Native, _, Some(topk)) => {
            OwnedGate::TopK(TopK { gain: rows.rank_gain, ..topk })
        }
        (Activation::Native, Architecture::JumpRelu, _) => {
            OwnedGate::Threshold(rows.threshold.unwrap_or(zeros))
        }
        (Activation::Native, Architecture::Gated, _) => {
            OwnedGate::Gated(gate_bias.unwrap_or(zeros))
        }
        _ => OwnedGate::Relu,
    };
    let (weight, glu_bias) = side_by_side(rows.weight, rows.glu, rows.d_in);
    OwnedRows {
        d_in: rows.d_in,
        weight,
        sign_weight: vec![1.0; rows.bias.len()],
        bias: rows.bias,
        scale,
        glu_bias,
        norm: recipe.token_norm,
        gate,
    }
}
