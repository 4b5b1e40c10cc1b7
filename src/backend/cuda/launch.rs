//! From a call to its kernel launches: grid, block, shared memory and parameters, as pure functions
//! of the call. Nothing here talks to a device.

use std::cmp::Reverse;
use std::ffi::{CStr, c_void};

use crate::backend::{
    BackwardCall, EncodeCall, Grad, Mask, Matrix, Output, PenaltyCall, Workspace,
};
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
/// Sections of the workspace start at multiples of this.
const SECTION: usize = 64;

macro_rules! kernels {
    ($($variant:ident $name:literal,)*) => {
        /// A `__global__` function of kernels/.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Kernel {
            $($variant,)*
        }

        impl Kernel {
            /// In the order of their numbers: `ALL[kernel as usize] == kernel`.
            pub const ALL: &[Kernel] = &[$(Kernel::$variant),*];

            /// The symbol in the module.
            pub fn name(self) -> &'static CStr {
                match self {
                    $(Kernel::$variant => $name,)*
                }
            }
        }
    };
}

kernels! {
    Pack c"blockem_pack",
    EncodeF32K8 c"blockem_encode_f32_8",
    EncodeF32K16 c"blockem_encode_f32_16",
    EncodeF32K24 c"blockem_encode_f32_24",
    EncodeF32K32 c"blockem_encode_f32_32",
    EncodeF32Wide c"blockem_encode_f32_wide",
    EncodeF16K8 c"blockem_encode_f16_8",
    EncodeF16K16 c"blockem_encode_f16_16",
    EncodeF16K24 c"blockem_encode_f16_24",
    EncodeF16K32 c"blockem_encode_f16_32",
    EncodeF16K8Tall c"blockem_encode_f16_8_tall",
    EncodeF16K16Tall c"blockem_encode_f16_16_tall",
    EncodeF16K24Tall c"blockem_encode_f16_24_tall",
    EncodeF16K32Tall c"blockem_encode_f16_32_tall",
    EncodeF16Wide c"blockem_encode_f16_wide",
    EncodeBf16K8 c"blockem_encode_bf16_8",
    EncodeBf16K16 c"blockem_encode_bf16_16",
    EncodeBf16K24 c"blockem_encode_bf16_24",
    EncodeBf16K32 c"blockem_encode_bf16_32",
    EncodeBf16K8Tall c"blockem_encode_bf16_8_tall",
    EncodeBf16K16Tall c"blockem_encode_bf16_16_tall",
    EncodeBf16K24Tall c"blockem_encode_bf16_24_tall",
    EncodeBf16K32Tall c"blockem_encode_bf16_32_tall",
    EncodeBf16Wide c"blockem_encode_bf16_wide",
    GradientF32Few c"blockem_gradient_f32_few",
    GradientF32Wide c"blockem_gradient_f32_wide",
    GradientF16Few c"blockem_gradient_f16_few",
    GradientF16Wide c"blockem_gradient_f16_wide",
    GradientBf16Few c"blockem_gradient_bf16_few",
    GradientBf16Wide c"blockem_gradient_bf16_wide",
    ReduceLatents c"blockem_reduce_latents",
    ReduceTotal c"blockem_reduce_total",
}

impl Kernel {
    /// The largest dynamic shared memory that it is launched with.
    pub fn shared_limit(self) -> u32 {
        use Kernel::*;
        let bytes = match self {
            Pack => 0,
            ReduceLatents | ReduceTotal => REDUCE_SHARED,
            GradientF32Few | GradientF32Wide => gradient_shared(self, DType::F32),
            GradientF16Few | GradientF16Wide => gradient_shared(self, DType::F16),
            GradientBf16Few | GradientBf16Wide => gradient_shared(self, DType::BF16),
            _ => ENCODE_TILES.iter().find(|t| t.kernel == self).map_or(0, EncodeTile::shared),
        };
        bytes as u32
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub kernel: Kernel,
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    pub params: Params,
}

/// A kernel's only parameter, by value. The structs are those of kernels/params.cuh.
#[derive(Clone, Copy, Debug)]
pub(super) enum Params {
    Pack(PackParams),
    Encode(EncodeParams),
    Gradient(GradientParams),
    Reduce(ReduceParams),
}

impl Params {
    /// What an entry of `kernelParams` points to.
    pub fn as_ptr(&self) -> *const c_void {
        match self {
            Params::Pack(p) => (&raw const *p).cast(),
            Params::Encode(p) => (&raw const *p).cast(),
            Params::Gradient(p) => (&raw const *p).cast(),
            Params::Reduce(p) => (&raw const *p).cast(),
        }
    }

    #[cfg(test)]
    pub fn bytes(&self) -> &[u8] {
        let size = match self {
            Params::Pack(_) => size_of::<PackParams>(),
            Params::Encode(_) => size_of::<EncodeParams>(),
            Params::Gradient(_) => size_of::<GradientParams>(),
            Params::Reduce(_) => size_of::<ReduceParams>(),
        };
        // SAFETY: the struct has this size, and no padding: its fields' sizes add up to it.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), size) }
    }
}

macro_rules! params {
    ($(#[$doc:meta] $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            #[$doc]
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default)]
            pub(super) struct $name {
                $($field: $type,)*
            }

            // `Params::bytes` relies on it.
            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())*);
        )*

        /// Sizes and offsets as kernels/params.cuh must have them.
        #[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
        pub(super) fn layout() -> String {
            let mut lines = String::new();
            $(
                lines += &format!("{} {}\n", stringify!($name), size_of::<$name>());
                $(lines += &format!(
                    "{}.{} {}\n",
                    stringify!($name),
                    stringify!($field),
                    std::mem::offset_of!($name, $field)
                );)*
            )*
            lines
        }
    };
}

params! {
    /// Encoder rows on the device.
    RowsParams {
        packed: u64,
        bias: u64,
        scale: u64,
        gate_values: u64,
        sign_weight: u64,
        count: u32,
        padded_count: u32,
        d_in: u32,
        gate: u32,
    }

    /// kernels/pack.cu
    PackParams {
        weight: u64,
        weight_stride: u64,
        packed: u64,
        count: u32,
        padded_count: u32,
        d_in: u32,
        slices: u32,
    }

    /// kernels/encode.cu. Absent outputs are 0; with `latents` the rest of the outputs is absent.
    EncodeParams {
        rows: RowsParams,
        hidden: u64,
        hidden_stride: u64,
        latents: u64,
        latents_stride: u64,
        reference: u64,
        reference_stride: u64,
        mask: u64,
        mask_stride: u64,
        coef: u64,
        coef_stride: u64,
        loss_partials: u64,
        count_partials: u64,
        tokens: u64,
        mask_is_f32: u32,
        hidden_is_aligned: u32,
    }

    /// kernels/gradient.cu
    GradientParams {
        packed: u64,
        coef: u64,
        coef_stride: u64,
        grad: u64,
        grad_stride: u64,
        scale_tensor: u64,
        scale: f64,
        tokens: u64,
        count: u32,
        padded_count: u32,
        d_in: u32,
        tiles_per_cta: u32,
        column_tiles: u32,
        accumulate: u32,
        coef_is_aligned: u32,
        grad_is_aligned: u32,
    }

    /// An output of one or more numbers.
    OutputParams {
        data: u64,
        stride: u64,
        is_f64: u64,
    }

    /// kernels/reduce.cu
    ReduceParams {
        loss_partials: u64,
        count_partials: u64,
        latent_sums: u64,
        tiles: u64,
        tokens: u64,
        loss_sum: OutputParams,
        token_count: OutputParams,
        latent_loss: OutputParams,
        count: u32,
        padded_count: u32,
    }
}

/// The launches of one call, in order.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Launches([Option<Launch>; 4]);

impl Launches {
    pub fn iter(&self) -> impl Iterator<Item = &Launch> {
        self.0.iter().flatten()
    }

    fn push(&mut self, launch: Launch) {
        let free = self.0.iter_mut().find(|slot| slot.is_none());
        *free.expect("no call has more than four launches") = Some(launch);
    }
}

/// A plan's rows in device memory: addresses, 0 where absent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceRows {
    pub d_in: usize,
    /// K
    pub count: usize,
    pub gate: GateKind,
    /// What [`pack`] writes, [`packed_bytes`] long, at a multiple of 16.
    pub packed: u64,
    /// f32 [K]
    pub bias: u64,
    /// f32 [K] or absent
    pub scale: u64,
    /// f32 [K]: thresholds, or biases of the gate
    pub gate_values: u64,
    /// f32 [K]
    pub sign_weight: u64,
}

/// [`crate::backend::Gate`] without its values; the numbers are those of kernels/params.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum GateKind {
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

/// Packs f32 rows [K, d] that are on the device.
pub(super) fn pack(weight: u64, weight_stride: usize, rows: &DeviceRows) -> Launch {
    let slices = rows.d_in.div_ceil(SLICE);
    // A thread packs eight columns of a row.
    let threads = slices * padded_count(rows.count) * (SLICE / 8);
    Launch {
        kernel: Kernel::Pack,
        grid: [threads.div_ceil(256) as u32, 1, 1],
        block: 256,
        shared: 0,
        params: Params::Pack(PackParams {
            weight,
            weight_stride: weight_stride as u64,
            packed: rows.packed,
            count: rows.count as u32,
            padded_count: padded_count(rows.count) as u32,
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
pub(super) fn encode(rows: &DeviceRows, call: &EncodeCall) -> Launches {
    let mut launches = Launches::default();
    if call.tokens > 0 {
        let params = EncodeParams {
            latents: address(call.latents.data),
            latents_stride: call.latents.row_stride as u64,
            ..encode_params(rows, call.tokens, &call.hidden)
        };
        launches.push(encode_launch(rows, &call.hidden, params));
    }
    launches
}

/// What both uses of the encode kernels have in common.
fn encode_params(rows: &DeviceRows, tokens: usize, hidden: &Matrix) -> EncodeParams {
    EncodeParams {
        rows: RowsParams {
            packed: rows.packed,
            bias: rows.bias,
            scale: rows.scale,
            gate_values: rows.gate_values,
            sign_weight: rows.sign_weight,
            count: rows.count as u32,
            padded_count: padded_count(rows.count) as u32,
            d_in: rows.d_in as u32,
            gate: rows.gate as u32,
        },
        hidden: address(hidden.data),
        hidden_stride: hidden.row_stride as u64,
        hidden_is_aligned: rows_are_aligned(hidden, 16),
        tokens: tokens as u64,
        ..EncodeParams::default()
    }
}

fn encode_launch(rows: &DeviceRows, hidden: &Matrix, params: EncodeParams) -> Launch {
    let tile = EncodeTile::of(hidden.dtype, rows.count, params.tokens as usize);
    let tiles = (params.tokens as usize).div_ceil(tile.tokens) * rows.count.div_ceil(tile.latents);
    Launch {
        kernel: tile.kernel,
        grid: [tiles as u32, 1, 1],
        block: tile.threads,
        shared: tile.shared() as u32,
        params: Params::Encode(params),
    }
}

/// The workspace of a penalty call.
struct Sections {
    /// f32 [T, K rounded up to 4], when the caller keeps no coefficients
    coef: u64,
    coef_stride: usize,
    /// f64 [token tiles, K rounded up to 8]
    loss_partials: u64,
    /// f64 [token tiles]
    count_partials: u64,
    /// f64 [K]
    latent_sums: u64,
}

/// The sections behind an address, and the bytes that they take.
fn sections(start: u64, count: usize, tokens: usize) -> (Sections, usize) {
    // No tile has fewer tokens.
    let tiles = tokens.div_ceil(64);
    let coef_stride = count.next_multiple_of(4);
    let mut end = 0;
    let mut section = |bytes: usize| {
        let at = start + end as u64;
        end += bytes.next_multiple_of(SECTION);
        at
    };
    let sections = Sections {
        coef: section(tokens * coef_stride * 4),
        coef_stride,
        loss_partials: section(tiles * padded_count(count) * 8),
        count_partials: section(tiles * 8),
        latent_sums: section(count * 8),
    };
    (sections, end)
}

/// Bytes of workspace, at a multiple of 64, that [`penalty`] needs.
pub(super) fn workspace_size(count: usize, _d_in: usize, tokens: usize) -> usize {
    sections(0, count, tokens).1
}

/// Loss, and with `grad` also dH.
pub(super) fn penalty(rows: &DeviceRows, call: &PenaltyCall) -> Launches {
    let mut launches = Launches::default();
    let Workspace { data, size } = call.workspace;
    let (space, needed) = sections(address(data), rows.count, call.tokens);
    debug_assert!(size >= needed, "a workspace of {size} bytes for {needed}");
    let own_coef = Matrix {
        data: std::ptr::without_provenance_mut(space.coef as usize),
        dtype: DType::F32,
        row_stride: space.coef_stride,
    };
    let coef = call.coef.or(call.grad.map(|_| own_coef));
    let sums = call.loss_sum.or(call.token_count).or(call.latent_loss).is_some();
    if call.tokens > 0 {
        let params = EncodeParams {
            reference: address(call.reference.data),
            reference_stride: call.reference.row_stride as u64,
            mask: call.mask.map_or(0, |m| address(m.data.cast_mut())),
            mask_stride: call.mask.map_or(0, |m| m.stride as u64),
            mask_is_f32: call.mask.is_some_and(|m: Mask| m.dtype == DType::F32) as u32,
            coef: coef.map_or(0, |c| address(c.data)),
            coef_stride: coef.map_or(0, |c| c.row_stride as u64),
            loss_partials: if sums { space.loss_partials } else { 0 },
            count_partials: if sums { space.count_partials } else { 0 },
            ..encode_params(rows, call.tokens, &call.hidden)
        };
        launches.push(encode_launch(rows, &call.hidden, params));
        if let (Some(grad), Some(coef)) = (&call.grad, &coef) {
            launches.push(gradient_launch(rows, call.tokens, coef, grad));
        }
    }
    if sums {
        let tile = EncodeTile::of(call.hidden.dtype, rows.count, call.tokens);
        let params = Params::Reduce(ReduceParams {
            loss_partials: space.loss_partials,
            // Without a mask every token counts once.
            count_partials: call.mask.map_or(0, |_| space.count_partials),
            latent_sums: space.latent_sums,
            tiles: call.tokens.div_ceil(tile.tokens) as u64,
            tokens: call.tokens as u64,
            loss_sum: output_params(call.loss_sum),
            token_count: output_params(call.token_count),
            latent_loss: output_params(call.latent_loss),
            count: rows.count as u32,
            padded_count: padded_count(rows.count) as u32,
        });
        let blocks = rows.count.div_ceil(REDUCE_LATENTS) as u32;
        let launch = |kernel, blocks| Launch {
            kernel,
            grid: [blocks, 1, 1],
            block: 256,
            shared: REDUCE_SHARED as u32,
            params,
        };
        launches.push(launch(Kernel::ReduceLatents, blocks));
        // A single block has added up the latents itself.
        if blocks > 1 {
            launches.push(launch(Kernel::ReduceTotal, 1));
        }
    }
    launches
}

/// dH from saved coefficients.
pub(super) fn backward(rows: &DeviceRows, call: &BackwardCall) -> Launches {
    let mut launches = Launches::default();
    if call.tokens > 0 {
        launches.push(gradient_launch(rows, call.tokens, &call.coef, &call.grad));
    }
    launches
}

fn gradient_launch(rows: &DeviceRows, tokens: usize, coef: &Matrix, grad: &Grad) -> Launch {
    let few = rows.count <= GRADIENT_LATENTS;
    let dtype = grad.rows.dtype;
    let kernel = match (dtype, few) {
        (DType::BF16, true) => Kernel::GradientBf16Few,
        (DType::BF16, false) => Kernel::GradientBf16Wide,
        (DType::F16, true) => Kernel::GradientF16Few,
        (DType::F16, false) => Kernel::GradientF16Wide,
        (_, true) => Kernel::GradientF32Few,
        (_, false) => Kernel::GradientF32Wide,
    };
    let tile = if few { GRADIENT_TOKENS_FEW } else { GRADIENT_TOKENS_WIDE };
    let token_tiles = tokens.div_ceil(tile);
    let column_tiles = rows.d_in.div_ceil(GRADIENT_COLUMNS);
    // Few latents stay in shared memory while the CTA walks down the tokens.
    let tiles_per_cta =
        if few { (token_tiles * column_tiles / GRADIENT_CTAS).clamp(1, 16) } else { 1 };
    Launch {
        kernel,
        grid: [(token_tiles.div_ceil(tiles_per_cta) * column_tiles) as u32, 1, 1],
        block: 256,
        shared: gradient_shared(kernel, dtype) as u32,
        params: Params::Gradient(GradientParams {
            packed: rows.packed,
            coef: address(coef.data),
            coef_stride: coef.row_stride as u64,
            grad: address(grad.rows.data),
            grad_stride: grad.rows.row_stride as u64,
            scale_tensor: grad.scale_tensor.map_or(0, |p| address(p.cast_mut().cast())),
            scale: grad.scale,
            tokens: tokens as u64,
            count: rows.count as u32,
            padded_count: padded_count(rows.count) as u32,
            d_in: rows.d_in as u32,
            tiles_per_cta: tiles_per_cta as u32,
            column_tiles: column_tiles as u32,
            accumulate: grad.accumulate as u32,
            coef_is_aligned: rows_are_aligned(coef, 8),
            grad_is_aligned: rows_are_aligned(&grad.rows, 16),
        }),
    }
}

/// Shared memory of a gradient kernel: the packed weights of one stage, or of three.
fn gradient_shared(kernel: Kernel, dtype: DType) -> usize {
    use Kernel::*;
    let stages =
        if matches!(kernel, GradientF32Few | GradientF16Few | GradientBf16Few) { 1 } else { 3 };
    let terms = if dtype == DType::F32 { 3 } else { 2 };
    stages * terms * GRADIENT_LATENTS * GRADIENT_COLUMNS * 2
}

/// Whether every row starts at a multiple of so many bytes.
fn rows_are_aligned(matrix: &Matrix, bytes: usize) -> u32 {
    let start = matrix.data.addr().is_multiple_of(bytes);
    (start && (matrix.row_stride * matrix.dtype.size()).is_multiple_of(bytes)) as u32
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

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: DeviceRows = DeviceRows {
        d_in: 4096,
        count: 20,
        gate: GateKind::Relu,
        packed: 0x1000,
        bias: 0x2000,
        scale: 0,
        gate_values: 0,
        sign_weight: 0x3000,
    };

    fn matrix(address: usize, dtype: DType, row_stride: usize) -> Matrix {
        Matrix { data: std::ptr::without_provenance_mut(address), dtype, row_stride }
    }

    fn output(address: usize) -> Option<Output> {
        let data = std::ptr::without_provenance_mut(address);
        Some(Output { data, dtype: DType::F32, stride: 1 })
    }

    fn penalty_call(tokens: usize, count: usize) -> PenaltyCall {
        PenaltyCall {
            tokens,
            hidden: matrix(0x10_0000, DType::BF16, 4096),
            reference: matrix(0x20_0000, DType::F32, count),
            mask: None,
            coef: None,
            loss_sum: output(0x30_0000),
            token_count: output(0x30_0100),
            latent_loss: None,
            grad: Some(Grad {
                rows: matrix(0x40_0000, DType::BF16, 4096),
                accumulate: true,
                scale: 1.0,
                scale_tensor: None,
            }),
            workspace: Workspace {
                data: std::ptr::without_provenance_mut(0x50_0000),
                size: workspace_size(count, 4096, tokens),
            },
        }
    }

    fn kernels(launches: &Launches) -> Vec<(Kernel, u32)> {
        launches.iter().map(|l| (l.kernel, l.grid[0])).collect()
    }

    #[test]
    fn kernels_are_numbered_in_order_and_fit_every_device() {
        for (n, kernel) in Kernel::ALL.iter().enumerate() {
            assert_eq!(*kernel as usize, n);
            assert!(kernel.shared_limit() <= 99 << 10, "{kernel:?}");
        }
    }

    #[test]
    fn few_latents_take_one_pass_and_many_take_tiles() {
        use Kernel::*;
        let few = penalty(&ROWS, &penalty_call(8192, 20));
        // 128 tiles of tokens; 128 × 32 tiles of dH, four to a CTA.
        let expected = [(EncodeBf16K24, 128), (GradientBf16Few, 1024), (ReduceLatents, 1)];
        assert_eq!(kernels(&few), expected);
        let rows = DeviceRows { count: 1000, ..ROWS };
        let many = penalty(&rows, &penalty_call(300, 1000));
        let expected = [
            (EncodeBf16Wide, 3 * 16),
            (GradientBf16Wide, 3 * 32),
            (ReduceLatents, 32),
            (ReduceTotal, 1),
        ];
        assert_eq!(kernels(&many), expected);
        for launch in few.iter().chain(many.iter()) {
            assert!(launch.shared <= launch.kernel.shared_limit());
        }
    }

    #[test]
    fn without_tokens_only_the_sums_are_written() {
        let launches = penalty(&ROWS, &penalty_call(0, 20));
        assert_eq!(kernels(&launches), [(Kernel::ReduceLatents, 1)]);
        let hidden = matrix(0x10_0000, DType::F32, 4096);
        let call = EncodeCall { tokens: 0, hidden, latents: hidden, workspace: Workspace::NONE };
        assert_eq!(encode(&ROWS, &call).iter().count(), 0);
        let grad = penalty_call(0, 20).grad.expect("there is one");
        let call = BackwardCall {
            tokens: 0,
            coef: hidden,
            grad,
            hidden: None,
            workspace: Workspace::NONE,
        };
        assert_eq!(backward(&ROWS, &call).iter().count(), 0);
    }

    #[test]
    fn alignment_is_that_of_every_row() {
        for (address, stride, bytes, aligned) in
            [(0, 8, 16, 1), (16, 4096, 16, 1), (2, 8, 16, 0), (16, 9, 16, 0), (8, 4, 8, 1)]
        {
            let matrix = matrix(address, DType::BF16, stride);
            assert_eq!(rows_are_aligned(&matrix, bytes), aligned, "{matrix:?}");
        }
    }

    #[test]
    fn sections_do_not_overlap() {
        for (count, tokens) in [(1, 0), (1, 1), (20, 65), (4096, 200)] {
            let (s, end) = sections(64, count, tokens);
            let tiles = tokens.div_ceil(64);
            let ends = [
                (s.coef, 4 * tokens * s.coef_stride, s.loss_partials),
                (s.loss_partials, 8 * tiles * padded_count(count), s.count_partials),
                (s.count_partials, 8 * tiles, s.latent_sums),
                (s.latent_sums, 8 * count, 64 + end as u64),
            ];
            for (start, bytes, next) in ends {
                assert_eq!(start % 64, 0);
                assert!(start + bytes as u64 <= next, "K {count}, T {tokens}");
            }
        }
    }

    /// What tests/compile_kernels.sh makes a report of: each launch of a fused call, with the bytes
    /// that it must move and the packed rows that its blocks read through the cache.
    #[test]
    fn footprints() {
        let (tokens, d_in) = (8192, 4096);
        for dtype in [DType::BF16, DType::F32] {
            for count in [20, 128, 1024, 4096] {
                let rows = DeviceRows { count, d_in, ..ROWS };
                let mut call = penalty_call(tokens, count);
                call.hidden.dtype = dtype;
                if let Some(grad) = &mut call.grad {
                    grad.rows.dtype = dtype;
                    grad.accumulate = false;
                }
                let launches = penalty(&rows, &call);
                let (matrix, values) = (tokens * d_in * dtype.size(), tokens * count * 4);
                for launch in launches.iter() {
                    let (must, packed) = match launch.params {
                        Params::Encode(_) => {
                            let tile = EncodeTile::of(dtype, count, tokens);
                            let rows = packed_bytes(tile.latents.min(count), d_in);
                            (matrix + 2 * values, launch.grid[0] as usize * rows)
                        }
                        Params::Gradient(p) => {
                            let tiles = launch.grid[0] as usize / p.column_tiles as usize;
                            let terms = if dtype == DType::F32 { 3 } else { 2 };
                            (matrix + values, tiles * packed_bytes(count, d_in) * terms / TERMS)
                        }
                        _ => (8 * tokens.div_ceil(64) * padded_count(count), 0),
                    };
                    assert!(launch.shared <= launch.kernel.shared_limit());
                    println!(
                        "launch {} {count} {} {} {} {} {must} {packed}",
                        dtype.name(),
                        launch.kernel.name().to_string_lossy(),
                        launch.grid[0],
                        launch.block,
                        launch.shared
                    );
                }
            }
        }
    }
}
