//! Shapes of the kernels for compute capability 9.0.

use super::kernel::{Kernel, Launch, Target};
use super::params::{EncodeParams, GradientParams, Params, ResidentParams};
use super::{GRADIENT_COLUMNS, GRADIENT_LATENTS, SLICE, TERMS, padded_count};
use crate::tensor::DType;

/// Largest dynamic shared memory of a block.
pub const SHARED_MOST: usize = 227 << 10;
/// Tokens of a tile of every kernel here.
pub const TOKENS: usize = 128;
/// Latents and stages of kernels/encode_sm90.cu, and sums of losses that its warps tell each other.
const ENCODE_LATENTS: usize = 64;
const ENCODE_LOSSES: usize = 8 * ENCODE_LATENTS * 8;
/// Stages of kernels/gradient_sm90.cu.
const GRADIENT_STAGES: usize = 6;
/// Blocks at most that share packed rows in these two.
const SHARING: usize = 4;
/// Parts of a dot product (kernels/encode.cuh).
const PARTS: usize = 8;
/// Latents of kernels/resident_sm90.cu, its stages at most, and the bytes that its products read
/// behind the packed rows.
const RESIDENT_LATENTS: usize = 32;
const RESIDENT_STAGES: usize = 6;
const RESIDENT_BEHIND: usize = 1 << 10;
/// Bytes of hidden states that one block has on their way to hide the memory's latency.
const AHEAD: usize = 64 << 10;
/// Blocks of a launch of it at most, each with sums of its own.
pub const RESIDENT_BLOCKS: usize = 256;
/// A barrier in shared memory.
const BARRIER: usize = 8;

/// Blocks of a cluster that share packed rows: as many as leave few of them without tokens.
fn sharing(token_tiles: usize) -> usize {
    let waste = |blocks: usize| token_tiles.next_multiple_of(blocks) - token_tiles;
    let mut blocks = SHARING;
    while blocks > 1 && 8 * waste(blocks) > token_tiles {
        blocks /= 2;
    }
    blocks
}

/// A launch of clusters that take tiles of tokens and, one after the other, `across` tiles each.
fn launch(kernel: Kernel, tokens: usize, across: usize, block: u32, params: Params) -> Launch {
    let tiles = tokens.div_ceil(TOKENS);
    let cluster = sharing(tiles);
    Launch {
        kernel,
        grid: [(tiles.next_multiple_of(cluster) * across) as u32, 1, 1],
        cluster: cluster as u32,
        block,
        shared: 0,
        params,
    }
}

/// Latents of any number.
pub fn encode(dtype: DType, tokens: usize, latents: usize, params: EncodeParams) -> Launch {
    let (kernel, stages) = match dtype {
        DType::BF16 => (Kernel::EncodeBf16Sm90, 5),
        DType::F16 => (Kernel::EncodeF16Sm90, 5),
        _ => (Kernel::EncodeF32Sm90, 3),
    };
    let weights = ENCODE_LATENTS * TERMS * SLICE * DType::BF16.size();
    let stage = weights + TOKENS * SLICE * dtype.size() + 2 * BARRIER;
    let across = latents.div_ceil(ENCODE_LATENTS);
    Launch {
        shared: (stages * stage + ENCODE_LOSSES) as u32,
        ..launch(kernel, tokens, across, 288, Params::Encode(params))
    }
}

/// dH of any number of latents.
pub fn gradient(dtype: DType, params: GradientParams) -> Launch {
    let (kernel, terms) = match dtype {
        DType::BF16 => (Kernel::GradientBf16Sm90, 2),
        DType::F16 => (Kernel::GradientF16Sm90, 2),
        _ => (Kernel::GradientF32Sm90, 3),
    };
    let stage = GRADIENT_LATENTS * GRADIENT_COLUMNS * terms * DType::BF16.size() + 2 * BARRIER;
    let column_tiles = (params.d_in as usize).div_ceil(GRADIENT_COLUMNS);
    let params = GradientParams { column_tiles: column_tiles as u32, ..params };
    Launch {
        shared: (GRADIENT_STAGES * stage) as u32,
        ..launch(kernel, params.tokens as usize, column_tiles, 384, Params::Gradient(params))
    }
}

/// Up to 32 rows that stay in the shared memory of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    kernel: Kernel,
    /// Of a cluster.
    blocks: usize,
    clusters: usize,
    tiles: usize,
    stages: usize,
    /// Of a block at most.
    slices: usize,
    shared: usize,
}

impl Resident {
    /// `None` where there are too many rows, or columns, or the device has no such clusters.
    pub fn new(
        target: Target,
        rows: usize,
        d_in: usize,
        dtype: DType,
        tokens: usize,
    ) -> Option<Resident> {
        let Target::Sm90 { clusters } = target else { return None };
        let tiles = tokens.div_ceil(TOKENS);
        if rows > RESIDENT_LATENTS {
            return None;
        }
        let [four, eight] = [(4, clusters[0]), (8, clusters[1])].map(|(blocks, at_once)| {
            let at_once = (at_once as usize).min(RESIDENT_BLOCKS / blocks);
            Resident::of(rows, d_in, dtype, blocks, at_once.min(tiles), tiles)
        });
        let hides_latency = |r: &Resident| (r.stages - 1) * stage(dtype) >= AHEAD;
        // With few tokens, more blocks for each; else the fewest that have room.
        let few = eight.filter(|r| r.clusters == tiles);
        few.or(four.filter(hides_latency)).or(eight).or(four)
    }

    fn of(
        rows: usize,
        d_in: usize,
        dtype: DType,
        blocks: usize,
        clusters: usize,
        tiles: usize,
    ) -> Option<Resident> {
        let latents = padded_count(rows);
        let (all, own_parts) = (d_in.div_ceil(SLICE), PARTS / blocks);
        let start = |part: usize| part * all / PARTS;
        let of_block = |rank: usize| start((rank + 1) * own_parts) - start(rank * own_parts);
        let slices = (0..blocks).map(of_block).max().unwrap_or(0);
        let weights = slices * (TERMS * latents * SLICE * DType::BF16.size() + BARRIER);
        let numbers = (PARTS * TOKENS / blocks + TOKENS) * latents;
        let rest = weights + RESIDENT_BEHIND + numbers * size_of::<f32>() + 2 * BARRIER;
        let stages = SHARED_MOST.saturating_sub(rest) / stage(dtype);
        let stages = stages.min(RESIDENT_STAGES);
        (stages >= 3 && clusters > 0).then(|| Resident {
            kernel: kernel(dtype, latents),
            blocks,
            clusters,
            tiles,
            stages,
            slices,
            shared: rest + stages * stage(dtype),
        })
    }

    /// Blocks, each of which adds up losses.
    pub fn all_blocks(&self) -> usize {
        self.clusters * self.blocks
    }

    pub fn launch(&self, encode: EncodeParams, gradient: GradientParams) -> Launch {
        Launch {
            kernel: self.kernel,
            grid: [self.all_blocks() as u32, 1, 1],
            cluster: self.blocks as u32,
            block: 256,
            shared: self.shared as u32,
            params: Params::Resident(ResidentParams {
                encode,
                gradient,
                tiles: self.tiles as u64,
                clusters: self.clusters as u32,
                stages: self.stages as u32,
                slices: self.slices as u32,
                padding: 0,
            }),
        }
    }
}

/// Bytes of a stage of hidden states.
fn stage(dtype: DType) -> usize {
    TOKENS * SLICE * dtype.size()
}

fn kernel(dtype: DType, latents: usize) -> Kernel {
    use Kernel::*;
    let by_latents = match dtype {
        DType::BF16 => [ResidentBf16K8, ResidentBf16K16, ResidentBf16K24, ResidentBf16K32],
        DType::F16 => [ResidentF16K8, ResidentF16K16, ResidentF16K24, ResidentF16K32],
        _ => [ResidentF32K8, ResidentF32K16, ResidentF32K24, ResidentF32K32],
    };
    by_latents[latents / 8 - 1]
}
