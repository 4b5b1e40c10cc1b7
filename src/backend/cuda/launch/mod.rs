//! From a call to its kernel launches: grid, block, shared memory and parameters, as pure functions
//! of the call. Nothing here talks to a device.

mod kernel;
mod params;
mod sm90;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;

pub(crate) use kernel::Target;
pub(super) use kernel::{Kernel, Launch};
#[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
pub(super) use params::layout;
use params::{
    EncodeParams, GluLatentsParams, GluParams, GradientParams, HiddenParams, MaskParams,
    NormParams, OutputParams, PackParams, Params, PullParams, ReduceParams, RowsParams,
    StatsParams, SteerParams, TokenNormsParams, TopKParams,
};
use sm90::Resident;

use crate::backend::{
    BackwardCall, EncodeCall, Grad, Mask, Matrix, Output, PenaltyCall, RIVALS_AT_ONCE, StatsCall,
    SteerCall, TokenNormsCall, Workspace,
};
use crate::sae::TokenNorm;
use crate::tensor::DType;

/// Columns of a slice: one tensor-core chain, and one block of the packed form.
const SLICE: usize = 64;
/// bf16 terms of a packed weight.
const TERMS: usize = 3;
/// Largest dynamic shared memory of every device from sm_80 on, less what the driver keeps.
const SHARED_MOST: usize = 96 << 10;
/// Latents that one CTA takes when a plan has few; more than that go to the wide kernels.
const FEW: usize = 32;
/// Tokens from which on tiles of 128 keep every device busy.
const TALL: usize = 1 << 14;
/// Tokens and columns of a gradient tile, and its latents at a time.
const GRADIENT_TOKENS_FEW: usize = 64;
const GRADIENT_TOKENS_WIDE: usize = 128;
const GRADIENT_COLUMNS: usize = 128;
const GRADIENT_LATENTS: usize = 32;
/// CTAs that fill every device several times; beyond, a CTA takes more than one token tile.
const GRADIENT_CTAS: usize = 1024;
/// Latents of a CTA of the first reduction.
const REDUCE_LATENTS: usize = 32;
/// Shared memory of the reductions: a number for each of 256 threads.
const REDUCE_SHARED: usize = 256 * 8;
/// Threads of a CTA of kernels/norm.cu and glu.cu, where each warp takes a token.
const NORM_THREADS: usize = 256;
/// Tokens and latents of a CTA of kernels/glu.cu, and a number for each of 256 threads.
const GLU_TOKENS: usize = 64;
const GLU_LATENTS: usize = 32;
const GLU_SHARED: usize = 256 * 8;
/// Threads of a CTA of kernels/topk.cu, and rivals of a part that each of them keeps.
const TOPK_THREADS: usize = 128;
const TOPK_OWN: usize = 16;
const _: () = assert!(RIVALS_AT_ONCE <= TOPK_THREADS * TOPK_OWN);
/// Keys of a part, and what the warps tell each other.
const TOPK_SHARED: usize = (TOPK_THREADS * TOPK_OWN + 2 * TOPK_THREADS / 32) * 4;
/// Tokens whose pre-activations of a part of the rivals are kept at a time.
pub(super) const TOKENS_AT_ONCE: usize = 4096;
/// Threads of a CTA of kernels/stats.cu, each with a latent.
const STATS_THREADS: usize = 64;
/// Latents of a part of a dictionary: enough threads for the sums. Where latents compete, those that
/// kernels/topk.cu takes at once.
const DICTIONARY_PART: usize = 8192;
/// Numbers of a tile of z: tokens times latents.
const STATS_TILE: usize = 1 << 23;
/// Threads of a CTA of kernels/steer.cu, each with eight columns of a position, and CTAs that fill
/// every device several times; beyond, a CTA takes more than one position.
const STEER_THREADS: usize = 128;
const STEER_COLUMNS: usize = 8 * STEER_THREADS;
const STEER_CTAS: usize = 1 << 14;
/// Sections of the workspace start at multiples of this.
const SECTION: usize = 64;

/// A plan's rows in device memory: addresses, 0 where absent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DeviceRows {
    pub target: Target,
    pub d_in: usize,
    /// K
    pub count: usize,
    pub norm: TokenNorm,
    pub gate: GateKind,
    /// What [`pack`] writes, [`packed_bytes`] long, at a multiple of 16.
    pub packed: u64,
    /// f32 [K]
    pub bias: u64,
    /// f32 [K] or absent
    pub scale: u64,
    /// f32 [K] or absent: of a GLU encoder, where latent k has rows 2k and 2k + 1
    pub glu_bias: u64,
    /// f32 [K]: thresholds, biases of the gate, or rank gains
    pub gate_values: u64,
    /// f32 [K]
    pub sign_weight: u64,
    /// Of [`GateKind::TopK`].
    pub topk: Option<DeviceTopK>,
}

impl DeviceRows {
    /// Rows of each latent.
    pub fn width(&self) -> usize {
        if self.is_glu() { 2 } else { 1 }
    }

    /// Rows of all latents, and so products of a token.
    pub fn products(&self) -> usize {
        self.count * self.width()
    }

    fn is_normed(&self) -> bool {
        self.norm != TokenNorm::None
    }

    fn is_glu(&self) -> bool {
        self.glu_bias != 0
    }

    /// dH depends on products too.
    fn gradient_needs_products(&self) -> bool {
        self.is_normed() || self.is_glu()
    }

    /// Every row as a latent of its own, without a bias or gate: z is its product.
    fn products_alone(&self) -> DeviceRows {
        DeviceRows {
            count: self.products(),
            gate: GateKind::Open,
            bias: 0,
            scale: 0,
            glu_bias: 0,
            gate_values: 0,
            sign_weight: 0,
            topk: None,
            ..*self
        }
    }
}

/// [`crate::backend::TopK`] with its rivals' rows, in device memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceTopK {
    pub k: usize,
    pub groups: usize,
    /// Rivals of each group.
    pub group_size: usize,
    pub by_magnitude: bool,
    /// u32 [K]
    pub group: u64,
    /// Rivals in parts of `at_once`, each packed for itself.
    pub packed: u64,
    /// f32 [rivals], times the gain unless the encoder is a GLU
    pub bias: u64,
    /// f32 [rivals] or absent: of a GLU encoder
    pub glu_bias: u64,
    /// f32 [rivals] or absent: what places a rival is its pre-activation times this.
    pub gain: u64,
    /// [`RIVALS_AT_ONCE`] and [`TOKENS_AT_ONCE`]; tests have smaller parts, of eight rivals at least.
    pub at_once: usize,
    pub tokens_at_once: usize,
}

impl DeviceTopK {
    pub fn rivals(&self) -> usize {
        self.groups * self.group_size
    }

    /// Bytes of all rivals' rows, so many for each.
    pub fn packed_bytes(&self, width: usize, d_in: usize) -> usize {
        let rest = self.rivals() % self.at_once;
        self.packed_before(self.rivals(), width, d_in) + packed_bytes(rest * width, d_in)
    }

    /// Bytes of the whole parts before a rival.
    fn packed_before(&self, rival: usize, width: usize, d_in: usize) -> usize {
        rival / self.at_once * packed_bytes(self.at_once * width, d_in)
    }

    /// The rivals from a multiple of `at_once` on, as rows without a gate.
    pub fn part(&self, first: usize, d_in: usize, target: Target) -> DeviceRows {
        let width = if self.glu_bias == 0 { 1 } else { 2 };
        let from = |start: u64| if start == 0 { 0 } else { start + (first * 4) as u64 };
        DeviceRows {
            target,
            d_in,
            count: self.at_once.min(self.rivals() - first),
            packed: self.packed + self.packed_before(first, width, d_in) as u64,
            bias: from(self.bias),
            scale: from(self.gain),
            glu_bias: from(self.glu_bias),
            ..DeviceRows::default()
        }
    }
}

/// All rows of a dictionary in device memory, in parts, each packed for itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceDictionary {
    /// Of all latents. Where they compete, the parts are the rivals' too.
    pub rows: DeviceRows,
    /// Latents of a part, and tokens of a tile; tests have less.
    pub at_once: usize,
    pub tokens_at_once: usize,
}

impl DeviceDictionary {
    /// Without addresses.
    pub fn new(d_in: usize, count: usize, norm: TokenNorm, gate: GateKind) -> DeviceDictionary {
        let at_once = if gate == GateKind::TopK { RIVALS_AT_ONCE } else { DICTIONARY_PART };
        DeviceDictionary {
            rows: DeviceRows { d_in, count, norm, gate, ..DeviceRows::default() },
            at_once,
            tokens_at_once: STATS_TILE / at_once,
        }
    }

    /// Bytes of all rows, so many for each latent.
    pub fn packed_bytes(&self, width: usize) -> usize {
        let DeviceRows { count, d_in, .. } = self.rows;
        count / self.at_once * packed_bytes(self.at_once * width, d_in)
            + packed_bytes(count % self.at_once * width, d_in)
    }

    /// The latents from a multiple of `at_once` on.
    pub fn part(&self, first: usize) -> DeviceRows {
        let rows = self.rows;
        let part = packed_bytes(self.at_once * rows.width(), rows.d_in);
        let of = |start: u64| if start == 0 { 0 } else { start + (first * 4) as u64 };
        DeviceRows {
            count: self.at_once.min(rows.count - first),
            packed: rows.packed + (first / self.at_once * part) as u64,
            bias: of(rows.bias),
            scale: of(rows.scale),
            glu_bias: of(rows.glu_bias),
            gate_values: of(rows.gate_values),
            sign_weight: of(rows.sign_weight),
            topk: rows.topk.map(|gate| DeviceTopK { group: of(gate.group), ..gate }),
            ..rows
        }
    }

    /// The rows as far as tokens are concerned, whatever the latents.
    fn of_tokens(&self) -> DeviceRows {
        DeviceRows { count: 0, ..self.rows }
    }
}

/// [`crate::backend::Gate`] without its values; the numbers are those of kernels/params.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum GateKind {
    #[default]
    Open = 0,
    Relu = 1,
    Threshold = 2,
    Gated = 3,
    TopK = 4,
}

/// Rows are packed in groups of eight: the latents of one mma.
fn padded_count(count: usize) -> usize {
    count.next_multiple_of(8)
}

/// Bytes of the packed form: every slice of 64 columns holds the three terms of every row.
pub(super) fn packed_bytes(count: usize, d_in: usize) -> usize {
    d_in.div_ceil(SLICE) * TERMS * padded_count(count) * SLICE * 2
}

/// Packs f32 rows [K · width, d] that are on the device.
pub(super) fn pack(weight: u64, weight_stride: usize, rows: &DeviceRows) -> Launch {
    let slices = rows.d_in.div_ceil(SLICE);
    // A thread packs eight columns of a row.
    let threads = slices * padded_count(rows.products()) * (SLICE / 8);
    Launch {
        kernel: Kernel::Pack,
        grid: [threads.div_ceil(256) as u32, 1, 1],
        cluster: 1,
        block: 256,
        shared: 0,
        params: Params::Pack(PackParams {
            weight,
            weight_stride: weight_stride as u64,
            packed: rows.packed,
            count: rows.products() as u32,
            padded_count: padded_count(rows.products()) as u32,
            d_in: rows.d_in as u32,
            slices: slices as u32,
        }),
    }
}

/// A tile of the encode kernels.
struct EncodeTile {
    kernel: Kernel,
    dtype: DType,
    tokens: usize,
    latents: usize,
    threads: u32,
}

impl EncodeTile {
    const fn few(kernel: Kernel, dtype: DType, latents: usize) -> EncodeTile {
        EncodeTile { kernel, dtype, tokens: 64, latents, threads: 128 }
    }

    const fn tall(kernel: Kernel, dtype: DType, latents: usize) -> EncodeTile {
        EncodeTile { kernel, dtype, tokens: 128, latents, threads: 128 }
    }

    const fn wide(kernel: Kernel, dtype: DType, tokens: usize) -> EncodeTile {
        EncodeTile { kernel, dtype, tokens, latents: 64, threads: 256 }
    }

    fn of(dtype: DType, count: usize, tokens: usize) -> &'static EncodeTile {
        let most = if tokens > TALL { 128 } else { 64 };
        let fits = |t: &&EncodeTile| {
            let few = t.latents >= count && t.tokens <= most;
            t.dtype == dtype && (few || t.latents > FEW)
        };
        let tallest_of_the_narrowest = |t: &&EncodeTile| (t.latents, Reverse(t.tokens));
        let tiles = ENCODE_TILES.iter().filter(fits);
        tiles.min_by_key(tallest_of_the_narrowest).expect("every dtype has a wide tile")
    }

    /// Stages of 64 columns: as many as fit, six at most.
    fn shared(&self) -> usize {
        let stage =
            SLICE * (self.tokens * self.dtype.size() + self.latents * TERMS * DType::BF16.size());
        (SHARED_MOST / stage).min(6) * stage
    }
}

const ENCODE_TILES: &[EncodeTile] = &[
    EncodeTile::few(Kernel::EncodeF32K8, DType::F32, 8),
    EncodeTile::few(Kernel::EncodeF32K16, DType::F32, 16),
    EncodeTile::few(Kernel::EncodeF32K24, DType::F32, 24),
    EncodeTile::few(Kernel::EncodeF32K32, DType::F32, 32),
    EncodeTile::wide(Kernel::EncodeF32Wide, DType::F32, 64),
    EncodeTile::few(Kernel::EncodeF16K8, DType::F16, 8),
    EncodeTile::few(Kernel::EncodeF16K16, DType::F16, 16),
    EncodeTile::few(Kernel::EncodeF16K24, DType::F16, 24),
    EncodeTile::few(Kernel::EncodeF16K32, DType::F16, 32),
    EncodeTile::tall(Kernel::EncodeF16K8Tall, DType::F16, 8),
    EncodeTile::tall(Kernel::EncodeF16K16Tall, DType::F16, 16),
    EncodeTile::tall(Kernel::EncodeF16K24Tall, DType::F16, 24),
    EncodeTile::tall(Kernel::EncodeF16K32Tall, DType::F16, 32),
    EncodeTile::wide(Kernel::EncodeF16Wide, DType::F16, 128),
    EncodeTile::few(Kernel::EncodeBf16K8, DType::BF16, 8),
    EncodeTile::few(Kernel::EncodeBf16K16, DType::BF16, 16),
    EncodeTile::few(Kernel::EncodeBf16K24, DType::BF16, 24),
    EncodeTile::few(Kernel::EncodeBf16K32, DType::BF16, 32),
    EncodeTile::tall(Kernel::EncodeBf16K8Tall, DType::BF16, 8),
    EncodeTile::tall(Kernel::EncodeBf16K16Tall, DType::BF16, 16),
    EncodeTile::tall(Kernel::EncodeBf16K24Tall, DType::BF16, 24),
    EncodeTile::tall(Kernel::EncodeBf16K32Tall, DType::BF16, 32),
    EncodeTile::wide(Kernel::EncodeBf16Wide, DType::BF16, 128),
];

/// z of every token.
pub(super) fn encode(rows: &DeviceRows, call: &EncodeCall) -> impl Iterator<Item = Launch> + use<> {
    let tokens = Tokens { count: call.tokens, hidden: call.hidden, mask: None };
    let work = Work::new(rows, tokens, call.workspace);
    let params = EncodeParams {
        latents: address(call.latents.data),
        latents_stride: call.latents.row_stride as u64,
        ..work.encode_params()
    };
    let encode = work.encode(params, work.space.dots);
    work.norm(None).into_iter().chain(work.thresholds()).chain(encode)
}

/// Loss, and with `grad` also dH.
pub(super) fn penalty(
    rows: &DeviceRows,
    call: &PenaltyCall,
) -> impl Iterator<Item = Launch> + use<> {
    let tokens = Tokens { count: call.tokens, hidden: call.hidden, mask: call.mask };
    let work = Work::new(rows, tokens, call.workspace);
    debug_assert!(call.workspace.size >= workspace_size(rows, call.tokens));
    let Sections { coef: own, dots, loss_partials, count_partials, .. } = work.space;
    let at_once = call.grad.and_then(|grad| work.at_once(&grad));
    let coef = call.coef.or(call.grad.filter(|_| at_once.is_none()).map(|_| own));
    let sums = call.loss_sum.or(call.token_count).or(call.latent_loss).is_some();
    let pulls = rows.is_normed() && call.grad.is_some();
    let params = EncodeParams {
        reference: address(call.reference.data),
        reference_stride: call.reference.row_stride as u64,
        coef: coef.map_or(0, |c| address(c.data)),
        coef_stride: coef.map_or(0, |c| c.row_stride as u64),
        dots: if pulls { address(dots.data) } else { 0 },
        dots_stride: dots.row_stride as u64,
        loss_partials: if sums { loss_partials } else { 0 },
        count_partials: if sums { count_partials } else { 0 },
        ..work.encode_params()
    };
    let first = work.norm(None).into_iter().chain(work.thresholds());
    let fused = at_once
        .zip(call.grad)
        .map(|(resident, grad)| resident.launch(params, work.gradient_params(&own, &grad)));
    let encode = work.encode(params, dots).filter(move |_| fused.is_none());
    let grad = call.grad.zip(coef).filter(move |_| fused.is_none()).into_iter();
    first
        .chain(fused)
        .chain(encode)
        .chain(grad.flat_map(move |(grad, coef)| work.gradient(&coef, &grad)))
        .chain(work.sums(call))
}

/// dH from saved coefficients. Where it depends on products, hidden states of tokens without a
/// violation are not read.
pub(super) fn backward(
    rows: &DeviceRows,
    call: &BackwardCall,
) -> impl Iterator<Item = Launch> + use<> {
    let BackwardCall { tokens: count, coef, grad, .. } = *call;
    let hidden = call.hidden.filter(|_| rows.gradient_needs_products());
    let products = hidden.map(|hidden| {
        let work = Work::new(rows, Tokens { count, hidden, mask: None }, call.workspace);
        let Sections { live, dots, .. } = work.space;
        let data = std::ptr::without_provenance(live as usize);
        let mask = Some(Mask { data, dtype: DType::F32, stride: 1 });
        let rows = rows.products_alone();
        let live = Work { rows, tokens: Tokens { mask, ..work.tokens }, ..work };
        let params = EncodeParams {
            latents: address(dots.data),
            latents_stride: dots.row_stride as u64,
            ..live.encode_params()
        };
        let encode = (count > 0).then(|| live.encode_launch(params));
        work.norm(Some(coef)).into_iter().chain(encode)
    });
    let tokens = Tokens { count, hidden: hidden.unwrap_or(NOTHING), mask: None };
    let work = Work::new(rows, tokens, call.workspace);
    products.into_iter().flatten().chain(work.gradient(&coef, &grad))
}

/// Sums over tokens for every latent: blocks of tokens, and of each block the parts of the rows.
pub(super) fn statistics(
    dictionary: &DeviceDictionary,
    call: &StatsCall,
) -> impl Iterator<Item = Launch> + use<> {
    let (dictionary, call) = (*dictionary, *call);
    debug_assert!(
        call.workspace.size
            >= stats_workspace_size(&dictionary, call.tokens, call.base_hidden.is_some())
    );
    // Without a token there is still a state to begin.
    let blocks = call.tokens.div_ceil(dictionary.tokens_at_once);
    let blocks = blocks.max(!call.accumulate as usize);
    (0..blocks).flat_map(move |block| {
        let first = block * dictionary.tokens_at_once;
        let sides = StatsBlock::new(&dictionary, &call, first);
        let of_tokens = sides
            .sides
            .into_iter()
            .flatten()
            .flat_map(|side: Work| side.norm(None).into_iter().chain(side.thresholds()));
        let parts = (0..dictionary.rows.count).step_by(dictionary.at_once);
        of_tokens.chain(parts.flat_map(move |part| sides.part(&dictionary, &call, part)))
    })
}

/// A block of tokens of both models.
#[derive(Clone, Copy)]
struct StatsBlock {
    first: usize,
    sides: [Option<Work>; 2],
    /// z of one part.
    tiles: [u64; 2],
    /// Of a GLU encoder, of one part and model after the other.
    products: u64,
}

impl StatsBlock {
    fn new(dictionary: &DeviceDictionary, call: &StatsCall, first: usize) -> StatsBlock {
        let rows = dictionary.of_tokens();
        let most = dictionary.tokens_at_once.min(call.tokens);
        let own = sections(0, &rows, most).1;
        let [tile, _] = stats_tile_bytes(dictionary, call.tokens);
        let start = |i: usize| address(call.workspace.data) + (i * (own + tile)) as u64;
        let side = |i: usize, hidden: Matrix| {
            let tokens = Tokens { count: call.tokens, hidden, mask: call.mask };
            let tokens = tokens.part(first, dictionary.tokens_at_once);
            Work { rows, tokens, space: sections(start(i), &rows, most).0 }
        };
        StatsBlock {
            first,
            sides: [Some(side(0, call.hidden)), call.base_hidden.map(|base| side(1, base))],
            tiles: [0, 1].map(|i| start(i) + own as u64),
            products: start(1 + call.base_hidden.is_some() as usize),
        }
    }

    /// z of a part's latents, and their sums.
    fn part(
        &self,
        dictionary: &DeviceDictionary,
        call: &StatsCall,
        part: usize,
    ) -> impl Iterator<Item = Launch> + use<> {
        let rows = dictionary.part(part);
        let StatsBlock { first, sides, tiles, products } = *self;
        let encode = move |(side, tile): (Work, u64)| {
            let work = Work { rows, ..side };
            let params = EncodeParams {
                latents: tile,
                latents_stride: dictionary_stride(rows.count) as u64,
                ..work.encode_params()
            };
            let products = Matrix {
                data: std::ptr::without_provenance_mut(products as usize),
                dtype: DType::F32,
                row_stride: dictionary_stride(rows.products()),
            };
            work.encode(params, products)
        };
        let [own, _] = sides;
        let tokens = own.map_or(0, |own| own.tokens.count);
        let count = call.token_count.filter(|_| part == 0);
        let add = Launch {
            kernel: Kernel::Stats,
            grid: [rows.count.div_ceil(STATS_THREADS) as u32, 1, 1],
            cluster: 1,
            block: STATS_THREADS as u32,
            shared: 0,
            params: Params::Stats(StatsParams {
                latents: tiles[0],
                base: if sides[1].is_some() { tiles[1] } else { 0 },
                stride: dictionary_stride(rows.count) as u64,
                mask: own.map_or(MaskParams::default(), |own| own.tokens.mask_params()),
                state: address(call.state.data) + (part * 8) as u64,
                state_stride: call.state.row_stride as u64,
                token_count: count.map_or(0, |count| address(count.cast())),
                tokens: tokens as u64,
                count: rows.count as u32,
                accumulate: (call.accumulate || first > 0) as u32,
            }),
        };
        let sides = sides.into_iter().zip(tiles).filter_map(|(side, tile)| Some((side?, tile)));
        sides.flat_map(encode).chain(std::iter::once(add))
    }
}

/// Numbers from one token's to the next, of so many.
fn dictionary_stride(count: usize) -> usize {
    count.next_multiple_of(4)
}

/// Bytes of a part's z of one model, and of a GLU encoder's products.
fn stats_tile_bytes(dictionary: &DeviceDictionary, tokens: usize) -> [usize; 2] {
    let latents = dictionary.at_once.min(dictionary.rows.count);
    let products = if dictionary.rows.is_glu() { 2 * latents } else { 0 };
    [latents, products].map(|count| {
        let numbers = dictionary.tokens_at_once.min(tokens) * dictionary_stride(count);
        (numbers * size_of::<f32>()).next_multiple_of(SECTION)
    })
}

/// Bytes of workspace, at a multiple of 64, that [`statistics`] needs.
pub(super) fn stats_workspace_size(
    dictionary: &DeviceDictionary,
    tokens: usize,
    has_base: bool,
) -> usize {
    let most = dictionary.tokens_at_once.min(tokens);
    let [tile, products] = stats_tile_bytes(dictionary, tokens);
    (1 + has_base as usize) * (sections(0, &dictionary.of_tokens(), most).1 + tile) + products
}

/// Unit vectors in device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceDirections {
    pub d_in: usize,
    pub count: usize,
    /// f32 [count, [`DeviceDirections::stride`]], zeros beyond d_in, at a multiple of 16.
    pub rows: u64,
}

impl DeviceDirections {
    /// Numbers from one to the next.
    pub fn stride(d_in: usize) -> usize {
        d_in.next_multiple_of(8)
    }
}

/// Hidden states pushed along directions; nothing where there is no position.
pub(super) fn steer(directions: &DeviceDirections, call: &SteerCall) -> Option<Launch> {
    let tokens = call.batch * call.positions;
    let column_tiles = directions.d_in.div_ceil(STEER_COLUMNS);
    let hidden = hidden_params(&call.hidden);
    let rows = Matrix { row_stride: call.hidden_stride, ..call.hidden };
    let is_aligned = hidden.is_aligned & rows_are_aligned(&rows, 16);
    let params = SteerParams {
        directions: directions.rows,
        directions_stride: DeviceDirections::stride(directions.d_in) as u64,
        hidden: HiddenParams { is_aligned, ..hidden },
        hidden_stride: call.hidden_stride as u64,
        row: call.row.data.addr() as u64,
        row_stride: call.row.stride as u64,
        strength: call.strength.data.addr() as u64,
        strength_stride: call.strength.stride as u64,
        mask: mask_params(call.mask),
        mask_stride: call.mask_stride as u64,
        scale_tensor: call.scale_tensor.map_or(0, |p| p.addr() as u64),
        scale: call.scale,
        batch: call.batch as u64,
        positions: call.positions as u64,
        column_tiles: column_tiles as u64,
        count: directions.count as u32,
        d_in: directions.d_in as u32,
    };
    let at_once = tokens.min(STEER_CTAS.div_ceil(column_tiles));
    (tokens > 0).then(|| Launch {
        kernel: Kernel::Steer,
        grid: [(at_once * column_tiles) as u32, 1, 1],
        cluster: 1,
        block: STEER_THREADS as u32,
        shared: 0,
        params: Params::Steer(params),
    })
}

/// The norm of every token; nothing where there is none.
pub(super) fn token_norms(call: &TokenNormsCall) -> Option<Launch> {
    (call.tokens > 0).then(|| Launch {
        kernel: Kernel::TokenNorms,
        grid: [call.tokens.div_ceil(NORM_THREADS / 32) as u32, 1, 1],
        cluster: 1,
        block: NORM_THREADS as u32,
        shared: 0,
        params: Params::TokenNorms(TokenNormsParams {
            hidden: hidden_params(&call.hidden),
            norms: output_params(Some(call.norms)),
            tokens: call.tokens as u64,
            d_in: call.d_in as u64,
        }),
    })
}

/// The tokens of a call.
#[derive(Clone, Copy)]
struct Tokens {
    count: usize,
    hidden: Matrix,
    mask: Option<Mask>,
}

impl Tokens {
    /// Some of them, from `first` on.
    fn part(&self, first: usize, most: usize) -> Tokens {
        let bytes = first * self.hidden.row_stride * self.hidden.dtype.size();
        let of_mask = |mask: Mask| Mask {
            data: mask.data.wrapping_add(first * mask.stride * mask.dtype.size()),
            ..mask
        };
        Tokens {
            count: most.min(self.count - first),
            hidden: Matrix { data: self.hidden.data.wrapping_add(bytes), ..self.hidden },
            mask: self.mask.map(of_mask),
        }
    }

    fn hidden_params(&self) -> HiddenParams {
        hidden_params(&self.hidden)
    }

    fn mask_params(&self) -> MaskParams {
        mask_params(self.mask)
    }
}

fn hidden_params(hidden: &Matrix) -> HiddenParams {
    HiddenParams {
        data: address(hidden.data),
        stride: hidden.row_stride as u64,
        dtype: match hidden.dtype {
            DType::F16 => 1,
            DType::BF16 => 2,
            _ => 0,
        },
        is_aligned: rows_are_aligned(hidden, 16),
    }
}

fn mask_params(mask: Option<Mask>) -> MaskParams {
    mask.map_or(MaskParams::default(), |mask| MaskParams {
        data: address(mask.data.cast_mut()),
        stride: mask.stride as u64,
        is_f32: (mask.dtype == DType::F32) as u64,
    })
}

/// Where nothing is read or written.
const NOTHING: Matrix = Matrix { data: std::ptr::null_mut(), dtype: DType::F32, row_stride: 0 };
const NO_GRAD: Grad = Grad { rows: NOTHING, accumulate: false, scale: 0.0, scale_tensor: None };

/// What the launches of a call have in common.
#[derive(Clone, Copy)]
struct Work {
    rows: DeviceRows,
    tokens: Tokens,
    space: Sections,
}

impl Work {
    fn new(rows: &DeviceRows, tokens: Tokens, workspace: Workspace) -> Work {
        let (space, _) = sections(address(workspace.data), rows, tokens.count);
        Work { rows: *rows, tokens, space }
    }

    /// What normalises each token, if anything does. With coefficients, of those that have any, and
    /// which these are.
    fn norm(&self, coef: Option<Matrix>) -> Option<Launch> {
        let nothing = !self.rows.is_normed() && coef.is_none();
        if nothing || self.tokens.count == 0 {
            return None;
        }
        let Sections { token_scales, token_means, token_slopes, live, .. } = self.space;
        Some(Launch {
            kernel: Kernel::Norm,
            params: Params::Norm(NormParams {
                hidden: self.tokens.hidden_params(),
                mask: self.tokens.mask_params(),
                coef: coef.map_or(0, |c| address(c.data)),
                coef_stride: coef.map_or(0, |c| c.row_stride as u64),
                scales: token_scales,
                means: token_means,
                slopes: token_slopes,
                live: coef.map_or(0, |_| live),
                tokens: self.tokens.count as u64,
                norm: match self.rows.norm {
                    TokenNorm::None => 0,
                    TokenNorm::Constant => 1,
                    TokenNorm::Layer => 2,
                },
                d_in: self.rows.d_in as u32,
                count: self.rows.count as u32,
            }),
            ..self.warps()
        })
    }

    /// A launch with a warp for each token.
    fn warps(&self) -> Launch {
        Launch {
            kernel: Kernel::Norm,
            grid: [self.tokens.count.div_ceil(NORM_THREADS / 32) as u32, 1, 1],
            cluster: 1,
            block: NORM_THREADS as u32,
            shared: 0,
            params: Params::Norm(NormParams::default()),
        }
    }

    /// The thresholds of a TopK gate: blocks of tokens, and of each block the parts of the rivals.
    fn thresholds(self) -> impl Iterator<Item = Launch> {
        self.rows.topk.into_iter().flat_map(move |gate| {
            (0..self.tokens.count).step_by(gate.tokens_at_once).flat_map(move |token| {
                let parts = (0..gate.rivals()).step_by(gate.at_once);
                parts.flat_map(move |rival| self.compare(&gate, token, rival))
            })
        })
    }

    /// The pre-activations of a part of the rivals, and what they change in the largest so far.
    fn compare(
        &self,
        gate: &DeviceTopK,
        token: usize,
        rival: usize,
    ) -> impl Iterator<Item = Launch> + use<> {
        let Sections { pre, rival_dots, largest, floors, thresholds, token_scales, .. } =
            self.space;
        let rows = gate.part(rival, self.rows.d_in, self.rows.target);
        let tokens = self.tokens.part(token, gate.tokens_at_once);
        let part = Work { rows, tokens, ..*self };
        let of_token = |start: u64, numbers: usize| start + (token * numbers * 4) as u64;
        let normed = self.rows.is_normed();
        let params = EncodeParams {
            token_scales: if normed { of_token(token_scales, 1) } else { 0 },
            latents: pre,
            latents_stride: gate.at_once as u64,
            ..part.encode_params()
        };
        let merge = Launch {
            kernel: Kernel::TopK,
            grid: [tokens.count as u32, 1, 1],
            cluster: 1,
            block: TOPK_THREADS as u32,
            shared: TOPK_SHARED as u32,
            params: Params::TopK(TopKParams {
                pre,
                pre_stride: gate.at_once as u64,
                largest,
                floors,
                thresholds: of_token(thresholds, gate.groups),
                mask: tokens.mask_params(),
                first: rival as u32,
                count: rows.count as u32,
                k: gate.k as u32,
                groups: gate.groups as u32,
                group_size: gate.group_size as u32,
                by_magnitude: gate.by_magnitude as u32,
            }),
        };
        part.encode(params, rival_dots).chain([merge])
    }

    /// What all uses of the encode kernels have in common.
    fn encode_params(&self) -> EncodeParams {
        let rows = &self.rows;
        EncodeParams {
            rows: RowsParams {
                packed: rows.packed,
                bias: rows.bias,
                scale: rows.scale,
                gate_values: rows.gate_values,
                sign_weight: rows.sign_weight,
                group: rows.topk.map_or(0, |gate| gate.group),
                groups: rows.topk.map_or(0, |gate| gate.groups as u32),
                by_magnitude: rows.topk.is_some_and(|gate| gate.by_magnitude) as u32,
                count: rows.count as u32,
                padded_count: padded_count(rows.count) as u32,
                d_in: rows.d_in as u32,
                gate: rows.gate as u32,
            },
            hidden: self.tokens.hidden_params(),
            mask: self.tokens.mask_params(),
            token_scales: if rows.is_normed() { self.space.token_scales } else { 0 },
            thresholds: rows.topk.map_or(0, |_| self.space.thresholds),
            tokens: self.tokens.count as u64,
            ..EncodeParams::default()
        }
    }

    /// What the parameters ask for; of a GLU encoder by way of products, which stay in `dots`.
    fn encode(&self, params: EncodeParams, dots: Matrix) -> impl Iterator<Item = Launch> + use<> {
        let glu = self.rows.is_glu().then(|| self.glu_latents(&params, &dots));
        let first = match glu {
            None => self.encode_launch(params),
            Some(_) => {
                let all = Work { rows: self.rows.products_alone(), ..*self };
                all.encode_launch(EncodeParams {
                    token_scales: params.token_scales,
                    latents: address(dots.data),
                    latents_stride: dots.row_stride as u64,
                    ..all.encode_params()
                })
            }
        };
        let there = self.tokens.count > 0;
        [Some(first), glu].into_iter().flatten().filter(move |_| there)
    }

    fn glu_latents(&self, params: &EncodeParams, dots: &Matrix) -> Launch {
        let tiles = self.tokens.count.div_ceil(GLU_TOKENS) * self.rows.count.div_ceil(GLU_LATENTS);
        Launch {
            kernel: Kernel::GluLatents,
            grid: [tiles as u32, 1, 1],
            cluster: 1,
            block: 256,
            shared: GLU_SHARED as u32,
            params: Params::GluLatents(GluLatentsParams {
                encode: EncodeParams {
                    rows: RowsParams { bias: 0, ..params.rows },
                    hidden: HiddenParams::default(),
                    dots: address(dots.data),
                    dots_stride: dots.row_stride as u64,
                    ..*params
                },
                bias: self.rows.bias,
                glu_bias: self.rows.glu_bias,
            }),
        }
    }

    fn encode_launch(&self, params: EncodeParams) -> Launch {
        let (count, tokens) = (self.rows.count, self.tokens.count);
        let dtype = self.tokens.hidden.dtype;
        if let Some(resident) = self.resident(dtype) {
            let gradient = self.gradient_params(&NOTHING, &NO_GRAD);
            return resident.launch(params, gradient);
        }
        if self.rows.target != Target::Portable {
            return sm90::encode(dtype, tokens, count, params);
        }
        let tile = EncodeTile::of(dtype, count, tokens);
        let tiles = tokens.div_ceil(tile.tokens) * count.div_ceil(tile.latents);
        Launch {
            kernel: tile.kernel,
            grid: [tiles as u32, 1, 1],
            cluster: 1,
            block: tile.threads,
            shared: tile.shared() as u32,
            params: Params::Encode(params),
        }
    }

    /// Rows that stay in shared memory, if there are such; `dtype` is that of hidden states or of dH.
    fn resident(&self, dtype: DType) -> Option<Resident> {
        let DeviceRows { target, d_in, .. } = self.rows;
        Resident::new(target, self.rows.products(), d_in, dtype, self.tokens.count)
    }

    /// For latents, the penalty and dH in one launch, where nothing comes between them.
    fn at_once(&self, grad: &Grad) -> Option<Resident> {
        let dtype = self.tokens.hidden.dtype;
        let is_possible = !self.rows.gradient_needs_products() && grad.rows.dtype == dtype;
        self.resident(dtype).filter(|_| is_possible && self.tokens.count > 0)
    }

    /// Sums of each latent's losses that are left to be added up.
    fn loss_partials(&self) -> usize {
        let (dtype, tokens) = (self.tokens.hidden.dtype, self.tokens.count);
        if self.rows.is_glu() {
            return tokens.div_ceil(GLU_TOKENS);
        }
        if let Some(resident) = self.resident(dtype) {
            return resident.all_blocks();
        }
        let of_tile = match self.rows.target {
            Target::Portable => EncodeTile::of(dtype, self.rows.count, tokens).tokens,
            Target::Sm90 { .. } => sm90::TOKENS,
        };
        tokens.div_ceil(of_tile)
    }

    /// dH from coefficients, and from the products beside them where it depends on these: those of a
    /// GLU's latents become those of its rows, and a norm multiplies them.
    fn gradient(&self, coef: &Matrix, grad: &Grad) -> impl Iterator<Item = Launch> + use<> {
        let there = self.tokens.count > 0;
        let glu = (there && self.rows.is_glu()).then(|| self.glu_coefficients(coef));
        let coef = if glu.is_some() { &self.space.row_coef } else { coef };
        let pull = (there && self.rows.is_normed()).then(|| self.pull(coef, grad));
        // The pull leaves them in the products' place.
        let coef = if pull.is_some() { &self.space.dots } else { coef };
        let gradient = there.then(|| self.gradient_launch(coef, grad));
        glu.into_iter().chain(pull).chain(gradient)
    }

    fn glu_coefficients(&self, coef: &Matrix) -> Launch {
        let Sections { dots, row_coef, .. } = self.space;
        Launch {
            kernel: Kernel::GluCoefficients,
            params: Params::Glu(GluParams {
                coef: address(coef.data),
                coef_stride: coef.row_stride as u64,
                dots: address(dots.data),
                dots_stride: dots.row_stride as u64,
                bias: self.rows.bias,
                glu_bias: self.rows.glu_bias,
                out: address(row_coef.data),
                out_stride: row_coef.row_stride as u64,
                tokens: self.tokens.count as u64,
                count: self.rows.count as u64,
            }),
            ..self.warps()
        }
    }

    fn pull(&self, coef: &Matrix, grad: &Grad) -> Launch {
        let Sections { dots, token_scales, token_means, token_slopes, token_pulls, .. } =
            self.space;
        Launch {
            kernel: Kernel::Pull,
            params: Params::Pull(PullParams {
                coef: address(coef.data),
                coef_stride: coef.row_stride as u64,
                dots: address(dots.data),
                dots_stride: dots.row_stride as u64,
                scales: token_scales,
                means: token_means,
                slopes: token_slopes,
                pulls: token_pulls,
                scale_tensor: scale_tensor(grad),
                scale: grad.scale,
                tokens: self.tokens.count as u64,
                count: self.rows.products() as u64,
            }),
            ..self.warps()
        }
    }

    fn gradient_launch(&self, coef: &Matrix, grad: &Grad) -> Launch {
        let dtype = grad.rows.dtype;
        let params = self.gradient_params(coef, grad);
        if let Some(resident) = self.resident(dtype) {
            return resident.launch(EncodeParams::default(), params);
        }
        if self.rows.target != Target::Portable {
            return sm90::gradient(dtype, params);
        }
        let few = self.rows.products() <= GRADIENT_LATENTS;
        let kernel = match (dtype, few) {
            (DType::BF16, true) => Kernel::GradientBf16Few,
            (DType::BF16, false) => Kernel::GradientBf16Wide,
            (DType::F16, true) => Kernel::GradientF16Few,
            (DType::F16, false) => Kernel::GradientF16Wide,
            (_, true) => Kernel::GradientF32Few,
            (_, false) => Kernel::GradientF32Wide,
        };
        let tile = if few { GRADIENT_TOKENS_FEW } else { GRADIENT_TOKENS_WIDE };
        let token_tiles = self.tokens.count.div_ceil(tile);
        let column_tiles = self.rows.d_in.div_ceil(GRADIENT_COLUMNS);
        // Few latents stay in shared memory while the CTA walks down the tokens.
        let tiles_per_cta =
            if few { (token_tiles * column_tiles / GRADIENT_CTAS).clamp(1, 16) } else { 1 };
        Launch {
            kernel,
            grid: [(token_tiles.div_ceil(tiles_per_cta) * column_tiles) as u32, 1, 1],
            cluster: 1,
            block: 256,
            shared: gradient_shared(kernel) as u32,
            params: Params::Gradient(GradientParams {
                tiles_per_cta: tiles_per_cta as u32,
                column_tiles: column_tiles as u32,
                ..params
            }),
        }
    }

    /// What all kernels that write dH take. How they share it is theirs.
    fn gradient_params(&self, coef: &Matrix, grad: &Grad) -> GradientParams {
        let rows = &self.rows;
        let normed = rows.is_normed();
        GradientParams {
            packed: rows.packed,
            coef: address(coef.data),
            coef_stride: coef.row_stride as u64,
            grad: address(grad.rows.data),
            grad_stride: grad.rows.row_stride as u64,
            scale_tensor: scale_tensor(grad),
            scale: grad.scale,
            pulls: if normed { self.space.token_pulls } else { 0 },
            hidden: if normed { self.tokens.hidden_params() } else { HiddenParams::default() },
            tokens: self.tokens.count as u64,
            count: rows.products() as u32,
            padded_count: padded_count(rows.products()) as u32,
            d_in: rows.d_in as u32,
            tiles_per_cta: 0,
            column_tiles: 0,
            accumulate: grad.accumulate as u32,
            coef_is_aligned: rows_are_aligned(coef, 8),
            grad_is_aligned: rows_are_aligned(&grad.rows, 16),
        }
    }

    /// The sums over tokens, if any is asked for.
    fn sums(&self, call: &PenaltyCall) -> impl Iterator<Item = Launch> + use<> {
        let count = self.rows.count;
        let params = Params::Reduce(ReduceParams {
            loss_partials: self.space.loss_partials,
            // Without a mask every token counts once.
            count_partials: call.mask.map_or(0, |_| self.space.count_partials),
            latent_sums: self.space.latent_sums,
            tiles: self.loss_partials() as u64,
            tokens: call.tokens as u64,
            loss_sum: output_params(call.loss_sum),
            token_count: output_params(call.token_count),
            latent_loss: output_params(call.latent_loss),
            count: count as u32,
            padded_count: padded_count(count) as u32,
        });
        let blocks = count.div_ceil(REDUCE_LATENTS) as u32;
        let launch = move |kernel, blocks| Launch {
            kernel,
            grid: [blocks, 1, 1],
            cluster: 1,
            block: 256,
            shared: REDUCE_SHARED as u32,
            params,
        };
        let asked = call.loss_sum.or(call.token_count).or(call.latent_loss).is_some();
        let latents = asked.then(|| launch(Kernel::ReduceLatents, blocks));
        // A single block has added up the latents itself.
        let total = (asked && blocks > 1).then(|| launch(Kernel::ReduceTotal, 1));
        latents.into_iter().chain(total)
    }
}

/// The workspace of a call.
#[derive(Clone, Copy)]
struct Sections {
    /// With a norm, of kernels/norm.cu: f32 [T] a, f32 [T] mean, f64 [T] q, f32 [T, 2] pull and mean
    token_scales: u64,
    token_means: u64,
    token_slopes: u64,
    token_pulls: u64,
    /// f32 [T], where dH depends on products: whether a token has a coefficient
    live: u64,
    /// f32 [T, rows rounded up to 4], there too: products, then with a norm coefficients of the rows
    dots: Matrix,
    /// f32 [T, 2K rounded up to 4], of a GLU encoder: coefficients of the rows
    row_coef: Matrix,
    /// f32 [T, groups], with a TopK gate
    thresholds: u64,
    /// f32 [tokens of a block, rivals of a part]
    pre: u64,
    /// f32 [tokens of a block, 2 · rivals of a part], of a GLU encoder: products
    rival_dots: Matrix,
    /// u32 [tokens of a block, k] and u32 [tokens of a block]
    largest: u64,
    floors: u64,
    /// f32 [T, K rounded up to 4], when the caller keeps no coefficients
    coef: Matrix,
    /// f64 [token tiles, K rounded up to 8]
    loss_partials: u64,
    /// f64 [token tiles]
    count_partials: u64,
    /// f64 [K]
    latent_sums: u64,
}

/// The sections behind an address, and the bytes that they take.
fn sections(start: u64, rows: &DeviceRows, tokens: usize) -> (Sections, usize) {
    // No tile has fewer tokens, and blocks that keep rows are not so many.
    let tiles = tokens.div_ceil(64).max(sm90::RESIDENT_BLOCKS.min(tokens.div_ceil(16) + 8));
    let (of_latents, of_rows) =
        (rows.count.next_multiple_of(4), rows.products().next_multiple_of(4));
    let normed = if rows.is_normed() { tokens } else { 0 };
    let dotted = if rows.gradient_needs_products() { tokens } else { 0 };
    let glu = if rows.is_glu() { tokens } else { 0 };
    let of_gate = |bytes: fn(&DeviceTopK) -> usize| rows.topk.as_ref().map_or(0, bytes);
    let block = tokens.min(of_gate(|gate| gate.tokens_at_once));
    let at_once = of_gate(|gate| gate.at_once);
    let mut end = 0;
    let mut section = |bytes: usize| {
        let at = start + end as u64;
        end += bytes.next_multiple_of(SECTION);
        at
    };
    let matrix = |at: u64, row_stride| Matrix {
        data: std::ptr::without_provenance_mut(at as usize),
        dtype: DType::F32,
        row_stride,
    };
    let sections = Sections {
        token_scales: section(4 * normed),
        token_means: section(4 * normed),
        token_slopes: section(8 * normed),
        token_pulls: section(8 * normed),
        live: section(4 * dotted),
        dots: matrix(section(4 * dotted * of_rows), of_rows),
        row_coef: matrix(section(4 * glu * of_rows), of_rows),
        thresholds: section(4 * tokens * of_gate(|gate| gate.groups)),
        pre: section(4 * block * at_once),
        rival_dots: matrix(section(4 * block.min(glu) * 2 * at_once), 2 * at_once),
        largest: section(4 * block * of_gate(|gate| gate.k)),
        floors: section(4 * block),
        coef: matrix(section(4 * tokens * of_latents), of_latents),
        loss_partials: section(tiles * padded_count(rows.count) * 8),
        count_partials: section(tiles * 8),
        latent_sums: section(rows.count * 8),
    };
    (sections, end)
}

/// Bytes of workspace, at a multiple of 64, that any call needs.
pub(super) fn workspace_size(rows: &DeviceRows, tokens: usize) -> usize {
    sections(0, rows, tokens).1
}

/// Shared memory of a gradient kernel: the packed weights of one stage, or of three.
fn gradient_shared(kernel: Kernel) -> usize {
    use Kernel::*;
    let stages =
        if matches!(kernel, GradientF32Few | GradientF16Few | GradientBf16Few) { 1 } else { 3 };
    let terms = if matches!(kernel, GradientF32Few | GradientF32Wide) { 3 } else { 2 };
    stages * terms * GRADIENT_LATENTS * GRADIENT_COLUMNS * 2
}

/// Whether every row starts at a multiple of so many bytes.
fn rows_are_aligned(matrix: &Matrix, bytes: usize) -> u32 {
    let start = matrix.data.addr().is_multiple_of(bytes);
    (start && (matrix.row_stride * matrix.dtype.size()).is_multiple_of(bytes)) as u32
}

fn scale_tensor(grad: &Grad) -> u64 {
    grad.scale_tensor.map_or(0, |p| address(p.cast_mut().cast()))
}

fn output_params(output: Option<Output>) -> OutputParams {
    output.map_or(OutputParams::default(), |o| OutputParams {
        data: address(o.data),
        stride: o.stride as u64,
        is_f64: (o.dtype == DType::F64) as u64,
    })
}

fn address(pointer: *mut u8) -> u64 {
    pointer.addr() as u64
}
