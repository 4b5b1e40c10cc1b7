//! The kernels, executed without a device: tests/simt compiles kernels/*.cu as C++, runs every
//! thread as a fiber under AddressSanitizer and UBSan, and these tests compare what comes out with
//! f64 arithmetic, and with itself bit for bit.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::collections::HashSet;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{fs, thread};

use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::launch::{
    DeviceDictionary, DeviceDirections, DeviceRows, DeviceTopK, GateKind, Kernel, Launch, Target,
    backward, encode, layout, pack, packed_bytes, penalty, statistics, stats_workspace_size, steer,
    token_norms, workspace_size,
};
use crate::backend::random::Random;
use crate::backend::{
    BackwardCall, Column, EncodeCall, Grad, Mask, Matrix, Output, PenaltyCall, StatsCall,
    SteerCall, TokenNormsCall, Workspace,
};
use crate::sae::TokenNorm;
use crate::stats::rows as stats_rows;
use crate::tensor::DType;

/// Where the harness maps a job's memory, so that addresses in parameters need no relocation.
const ADDRESS: u64 = 0x2000_0000_0000;
/// Lowest thread first, highest first, and at random.
const ORDERS: [u64; 3] = [0, 1, 0x5eed];

// ---------------------------------------------------------------------------------- the harness

const KERNELS: [&str; 12] = [
    "encode.cu",
    "encode_sm90.cu",
    "glu.cu",
    "gradient.cu",
    "gradient_sm90.cu",
    "norm.cu",
    "pack.cu",
    "reduce.cu",
    "resident_sm90.cu",
    "stats.cu",
    "steer.cu",
    "topk.cu",
];
const HARNESS: [&str; 2] = ["main.cpp", "simt.cpp"];
/// Neither instrumented nor slow: it touches nothing but its operands.
const TENSOR_CORE: &str = "tensor_core.cpp";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

const SANITIZERS: &[&str] = &["-O1", "-g1", "-fsanitize=address,undefined"];
/// A planted fault is to be found by what it does: this compiles in half the time.
const FEWER_SANITIZERS: &[&str] = &["-O1", "-fsanitize=address"];

/// Compiles one file; a machine without g++ cannot run these tests, and says so.
fn compile(source: &Path, object: &Path, kernels: &Path, sanitizers: &[&str]) {
    let mut gxx = Command::new("g++");
    gxx.args(["-std=c++17", "-ffp-contract=off", "-x", "c++"]);
    match source.ends_with(TENSOR_CORE) {
        true => gxx.args(["-O2", "-march=native", "-fopenmp-simd"]),
        false => gxx.args(sanitizers),
    };
    gxx.arg("-fno-sanitize-recover=all").arg("-I").arg(kernels).arg("-I");
    gxx.arg(root().join("tests/simt")).arg("-c").arg(source).arg("-o").arg(object);
    finish(gxx);
}

fn link(objects: &[PathBuf], program: &Path) {
    let mut gxx = Command::new("g++");
    gxx.arg("-fsanitize=address,undefined").args(objects).arg("-o").arg(program);
    finish(gxx);
}

fn finish(mut command: Command) {
    let output = command.output().expect("these tests need g++ with its sanitizers: install it");
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
}

fn object(folder: &Path, source: &str) -> PathBuf {
    folder.join(source).with_extension("o")
}

/// The folder with the harness and its objects, built once for each state of the sources.
fn harness() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let kernels = root().join("kernels");
        let mut sources: Vec<PathBuf> = [&kernels, &root().join("tests/simt")]
            .iter()
            .flat_map(|folder| fs::read_dir(folder).expect("sources beside Cargo.toml"))
            .map(|entry| entry.expect("a readable folder").path())
            .collect();
        sources.sort();
        sources.push(root().join("src/backend/cuda/tests.rs"));
        let mut hash = Sha256::new();
        sources.iter().for_each(|s| hash.update(fs::read(s).expect("a readable source")));
        let digest: String =
            hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let folder = root().join("target/simt").join(digest);
        if !folder.join("simt").exists() {
            fs::create_dir_all(root().join("target/simt")).expect("a writable target folder");
            let new = tempfile::tempdir_in(root().join("target/simt")).expect("a folder");
            build(&kernels, new.path());
            // Another process may have been faster; its build is the same.
            let _ = fs::rename(new.path(), &folder);
        }
        folder
    })
}

fn build(kernels: &Path, folder: &Path) {
    let files: Vec<PathBuf> = KERNELS
        .iter()
        .map(|k| kernels.join(k))
        .chain(HARNESS.iter().chain(&[TENSOR_CORE]).map(|h| root().join("tests/simt").join(h)))
        .collect();
    let objects: Vec<PathBuf> = files
        .iter()
        .map(|f| object(folder, f.file_name().and_then(|n| n.to_str()).expect("a plain name")))
        .collect();
    thread::scope(|scope| {
        for (file, object) in files.iter().zip(&objects) {
            scope.spawn(|| compile(file, object, kernels, SANITIZERS));
        }
    });
    link(&objects, &folder.join("simt"));
}

/// Runs the launches in each order of threads; the memory after each, or the harness's message.
fn run(program: &Path, arena: &Arena, launches: &[Launch]) -> Result<Vec<Vec<u8>>, String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (job, out) = (folder.path().join("job"), folder.path().join("out"));
    let mut words = vec![ADDRESS, arena.bytes.len() as u64, ORDERS.len() as u64];
    words.extend(ORDERS);
    words.push(arena.regions.len() as u64);
    words.extend(arena.regions.iter().flatten());
    words.extend([arena.callers as u64, launches.len() as u64]);
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    for launch in launches {
        let mut name = [0; 64];
        let symbol = launch.kernel.name().to_bytes();
        name[..symbol.len()].copy_from_slice(symbol);
        bytes.extend(name);
        assert_eq!(launch.grid[1..], [1, 1]);
        let params = launch.params.bytes();
        let Launch { grid, cluster, block, shared, .. } = *launch;
        for word in [grid[0], cluster, block, shared, params.len() as u32] {
            bytes.extend((word as u64).to_le_bytes());
        }
        bytes.extend(params);
    }
    bytes.extend(&arena.bytes);
    fs::write(&job, bytes).expect("a writable job");
    let output = Command::new(program)
        .arg("run")
        .args([&job, &out])
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .output()
        .expect("the harness starts");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let out = fs::read(&out).expect("the harness's output");
    assert_eq!(out.len(), ORDERS.len() * arena.bytes.len());
    Ok(out.chunks(arena.bytes.len().max(1)).map(<[u8]>::to_vec).collect())
}

// ------------------------------------------------------------------------------------- memory

/// A job's memory. Bytes outside its regions may not be touched by any kernel.
#[derive(Clone)]
struct Arena {
    bytes: Vec<u8>,
    regions: Vec<[u64; 2]>,
    /// Where callers' memory begins: what is before belongs to a plan, and nothing writes it while
    /// kernels run.
    callers: usize,
}

/// A matrix in an arena.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    address: u64,
    dtype: DType,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Buffer {
    fn matrix(&self) -> Matrix {
        Matrix { data: self.pointer(), dtype: self.dtype, row_stride: self.stride }
    }

    fn pointer(&self) -> *mut u8 {
        std::ptr::without_provenance_mut(self.address as usize)
    }

    fn output(&self) -> Output {
        Output { data: self.pointer(), dtype: self.dtype, stride: self.stride }
    }

    fn row(&self, t: usize) -> [u64; 2] {
        let size = self.dtype.size();
        [self.address + (t * self.stride * size) as u64, (self.cols * size) as u64]
    }

    fn at(&self, t: usize, i: usize) -> usize {
        assert!(t < self.rows && i < self.cols);
        (self.address - ADDRESS) as usize + (t * self.stride + i) * self.dtype.size()
    }

    fn get(&self, bytes: &[u8], t: usize, i: usize) -> f64 {
        let at = &bytes[self.at(t, i)..];
        match self.dtype {
            DType::F64 => f64::from_le_bytes(at[..8].try_into().expect("eight bytes")),
            DType::F32 => f32::from_le_bytes(at[..4].try_into().expect("four bytes")) as f64,
            DType::F16 => f16::from_le_bytes([at[0], at[1]]).to_f64(),
            DType::BF16 => bf16::from_le_bytes([at[0], at[1]]).to_f64(),
            _ => at[0] as f64,
        }
    }

    fn all(&self, bytes: &[u8]) -> Vec<f64> {
        (0..self.rows).flat_map(|t| (0..self.cols).map(move |i| self.get(bytes, t, i))).collect()
    }
}

impl Arena {
    fn new() -> Arena {
        Arena { bytes: Vec::new(), regions: Vec::new(), callers: 0 }
    }

    /// NaN in every element; `gap` elements between rows, the first one `offset` elements off
    /// alignment.
    fn matrix(&mut self, dtype: DType, rows: usize, cols: usize, place: Place) -> Buffer {
        let stride = cols + place.gap;
        let start = (self.bytes.len() + 64).next_multiple_of(256) + place.offset * dtype.size();
        let end = start + rows * stride * dtype.size() + 64;
        self.bytes.resize(end.next_multiple_of(64), 0xff);
        let buffer = Buffer { address: ADDRESS + start as u64, dtype, rows, cols, stride };
        self.regions.extend((0..rows).map(|t| buffer.row(t)));
        buffer
    }

    fn filled(&mut self, dtype: DType, cols: usize, values: &[f32], place: Place) -> Buffer {
        let rows = values.len() / cols;
        let buffer = self.matrix(dtype, rows, cols, place);
        for (n, value) in values.iter().enumerate() {
            self.set(&buffer, n / cols, n % cols, *value);
        }
        buffer
    }

    fn vector(&mut self, values: &[f32]) -> Buffer {
        self.filled(DType::F32, values.len(), values, Place::default())
    }

    fn space(&mut self, bytes: usize) -> Buffer {
        self.matrix(DType::U8, 1, bytes, Place::default())
    }

    fn set(&mut self, buffer: &Buffer, t: usize, i: usize, value: f32) {
        let at = buffer.at(t, i);
        match buffer.dtype {
            DType::F32 => self.bytes[at..][..4].copy_from_slice(&value.to_le_bytes()),
            DType::F16 => {
                self.bytes[at..][..2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
            }
            DType::BF16 => {
                self.bytes[at..][..2].copy_from_slice(&bf16::from_f32(value).to_le_bytes());
            }
            _ => self.bytes[at] = value as u8,
        }
    }

    /// Takes rows back from the kernels.
    fn forbid(&mut self, buffer: &Buffer, rows: impl Iterator<Item = usize>) {
        let rows: HashSet<[u64; 2]> = rows.map(|t| buffer.row(t)).collect();
        self.regions.retain(|region| !rows.contains(region));
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    gap: usize,
    offset: usize,
}

// ------------------------------------------------------------------------------------ problems

fn round(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Inputs of every call.
#[derive(Clone, Debug)]
struct Problem {
    name: String,
    target: Target,
    tokens: usize,
    count: usize,
    d_in: usize,
    /// [K, d], or [2K, d] of a GLU encoder: latent k has rows 2k and 2k + 1.
    weight: Vec<f32>,
    bias: Vec<f32>,
    scale: Option<Vec<f32>>,
    glu_bias: Option<Vec<f32>>,
    gate: GateKind,
    gate_values: Vec<f32>,
    norm: TokenNorm,
    dictionary: Dictionary,
    /// Rivals and tokens that are compared at a time.
    at_once: [usize; 2],
    sign_weight: Vec<f32>,
    hidden_dtype: DType,
    hidden: Vec<f32>,
    reference: Vec<f32>,
    mask: Option<(DType, Vec<f32>)>,
    grad_dtype: DType,
    grad: Vec<f32>,
    accumulate: bool,
    /// The sums' dtype.
    sums: DType,
    /// Whether the fused call keeps the coefficients.
    keeps_coef: bool,
    /// Of hidden, latents, reference, mask, coefficients, gradient, weights.
    places: [Place; 7],
}

const FACTOR: (f64, f32) = (1.4, 0.5);
/// Every second time one that the kernels of compute capability 9.0 serve. Few of its clusters of four
/// or of eight run at a time, so that tiles of tokens follow each other.
const TARGETS: [Target; 6] = [
    Target::Portable,
    Target::Portable,
    Target::Portable,
    Target::Sm90 { clusters: [1, 0] },
    Target::Sm90 { clusters: [2, 1] },
    Target::Sm90 { clusters: [0, 1] },
];

/// All latents of a TopK SAE, and where the blocked ones are among them.
#[derive(Clone, Debug)]
struct Dictionary {
    k: usize,
    groups: usize,
    group_size: usize,
    by_magnitude: bool,
    /// [K]
    group: Vec<u32>,
    /// [K]: where each blocked latent is among the rivals.
    rival: Vec<usize>,
    /// Of a GLU encoder two rows for each rival.
    weight: Vec<f32>,
    bias: Vec<f32>,
    glu_bias: Option<Vec<f32>>,
    gain: Option<Vec<f32>>,
}

/// Blocked latents are the last of their groups.
fn last_rivals(group: &[u32], group_size: usize) -> Vec<usize> {
    let rival = |k: usize| {
        let before = group[..k].iter().filter(|g| **g == group[k]).count();
        (group[k] as usize + 1) * group_size - 1 - before
    };
    (0..group.len()).map(rival).collect()
}

fn random_gains(random: &mut Random, count: usize) -> Vec<f32> {
    random.normals(count).iter().map(|x| x.abs() + 0.1).collect()
}

impl Dictionary {
    fn random(random: &mut Random, count: usize, d_in: usize, norm: TokenNorm) -> Dictionary {
        let groups = random.pick(&[1, 1, 2, 3]);
        let group_size = count.div_ceil(groups) + random.pick(&[0, 1, 70, 150]);
        let rivals = groups * group_size;
        let has_gain = random.below(3) == 0;
        let gain = has_gain.then(|| random_gains(random, rivals));
        let group: Vec<u32> = (0..count).map(|k| (k % groups) as u32).collect();
        Dictionary {
            gain,
            rival: last_rivals(&group, group_size),
            group,
            k: 1 + random.below(group_size.min(140)),
            groups,
            group_size,
            by_magnitude: random.below(2) == 0,
            weight: random.rows(rivals, d_in, d_in, norm),
            bias: random.normals(rivals).iter().map(|b| 0.2 * b).collect(),
            glu_bias: None,
        }
    }

    /// Rows and biases of the blocked latents.
    fn blocked(&self) -> (Vec<f32>, Vec<f32>) {
        let len = self.weight.len() / self.bias.len();
        let row = |rival: &usize| self.weight[rival * len..][..len].to_vec();
        let rivals = self.rival.iter();
        (rivals.clone().flat_map(row).collect(), rivals.map(|rival| self.bias[*rival]).collect())
    }

    fn blocked_gains(&self) -> Option<Vec<f32>> {
        let of = |gain: &Vec<f32>| self.rival.iter().map(|rival| gain[*rival]).collect();
        self.gain.as_ref().map(of)
    }

    fn gain(&self, rival: usize) -> f64 {
        self.gain.as_ref().map_or(1.0, |gain| gain[rival] as f64)
    }

    fn rank(&self, pre: f64) -> f64 {
        match self.by_magnitude {
            _ if pre.is_nan() => f64::INFINITY,
            true => pre.abs(),
            false => pre,
        }
    }
}

impl Problem {
    fn random(random: &mut Random, hidden_dtype: DType, shape: [usize; 3]) -> Problem {
        let gate = random.pick(&[
            GateKind::Open,
            GateKind::Relu,
            GateKind::Threshold,
            GateKind::Gated,
            GateKind::TopK,
        ]);
        let norm = random.pick(&[TokenNorm::None, TokenNorm::Constant, TokenNorm::Layer]);
        let norm = if shape[1] < 7 { TokenNorm::None } else { norm };
        let p = Problem::of(random, hidden_dtype, shape, gate, norm);
        let glu = gate != GateKind::Gated && random.below(3) == 0;
        if glu { p.with_glu(random) } else { p }
    }

    /// The same with a GLU encoder.
    fn with_glu(mut self, random: &mut Random) -> Problem {
        let mut rows = |count: usize| random.rows(2 * count, self.d_in, self.d_in, self.norm);
        let rivals = self.dictionary.bias.len();
        self.dictionary.weight = rows(rivals);
        self.weight = rows(self.count);
        let glu_bias = random.normals(rivals);
        self.glu_bias = Some(random.normals(self.count));
        if self.gate == GateKind::TopK {
            (self.weight, self.bias) = self.dictionary.blocked();
            self.glu_bias =
                Some(self.dictionary.rival.iter().map(|rival| glu_bias[*rival]).collect());
        }
        self.dictionary.glu_bias = Some(glu_bias);
        self.scale = None;
        self.name = format!("GLU, {}", self.name);
        self
    }

    fn of(
        random: &mut Random,
        hidden_dtype: DType,
        shape: [usize; 3],
        gate: GateKind,
        norm: TokenNorm,
    ) -> Problem {
        let [tokens, d_in, count] = shape;
        let seed = *random;
        let grad_dtype = random.pick(&[DType::F32, hidden_dtype]);
        let target = random.pick(&TARGETS);
        let sign_weight: Vec<f32> =
            (0..count).map(|_| random.pick(&[1.0, -1.0, 0.3, -2.5])).collect();
        // Some tokens violate nothing: their references are beyond reach.
        let calm: Vec<bool> = (0..tokens).map(|_| random.below(5) < 2).collect();
        let reference = (0..tokens * count)
            .map(|n| match calm[n / count] {
                true => 1e3 * sign_weight[n % count].signum(),
                false => random.normal(),
            })
            .collect();
        let mask_dtype = random.pick(&[DType::U8, DType::Bool, DType::F32]);
        let masks: &[f32] =
            if mask_dtype == DType::F32 { &[0.0, 1.0, 0.37, 1.5] } else { &[0.0, 1.0, 1.0, 7.0] };
        let mask = (random.below(3) > 0)
            .then(|| (mask_dtype, (0..tokens).map(|_| random.pick(masks)).collect()));
        let mut place = |gaps: &[usize]| Place {
            gap: random.pick(gaps),
            offset: if random.below(3) == 0 { random.below(7) + 1 } else { 0 },
        };
        // Rows on sixteen bytes, or not.
        let aligned = d_in.next_multiple_of(8) - d_in;
        let wide = [aligned, aligned + 64, 1, 0];
        let places = [
            place(&wide),
            place(&[0, 3, 8]),
            place(&[0, 3, 8]),
            place(&[0, 2]),
            place(&[0, 3, count % 2]),
            place(&wide),
            place(&[0, 3]),
        ];
        let dictionary = Dictionary::random(random, count, d_in, norm);
        let (weight, bias) = match gate {
            GateKind::TopK => dictionary.blocked(),
            _ => (
                random.rows(count, d_in, d_in, norm),
                random.normals(count).iter().map(|b| 0.2 * b).collect(),
            ),
        };
        let rivals = dictionary.groups * dictionary.group_size;
        let at_once = [
            random.pick(&[
                2048,
                rivals.next_multiple_of(8),
                rivals.div_ceil(2).next_multiple_of(8),
            ]),
            random.pick(&[4096, 33]),
        ];
        Problem {
            name: format!(
                "T {tokens}, d {d_in}, K {count}, {hidden_dtype:?} to {grad_dtype:?}, {gate:?}, \
                 {norm:?}, {target:?}, {places:?}, {at_once:?}, {seed:?}"
            ),
            target,
            tokens,
            count,
            d_in,
            weight,
            bias,
            scale: (random.below(2) == 0 && gate != GateKind::TopK)
                .then(|| random.normals(count).iter().map(|x| x.abs() + 0.2).collect()),
            glu_bias: None,
            gate,
            gate_values: random.normals(count).iter().map(|b| 0.2 * b).collect(),
            norm,
            dictionary,
            at_once,
            sign_weight,
            hidden_dtype,
            hidden: random
                .normals(tokens * d_in)
                .into_iter()
                .map(|x| round(hidden_dtype, x))
                .collect(),
            reference,
            mask,
            grad_dtype,
            grad: random.normals(tokens * d_in).into_iter().map(|x| round(grad_dtype, x)).collect(),
            accumulate: random.below(2) == 0,
            sums: random.pick(&[DType::F32, DType::F64]),
            keeps_coef: random.below(2) == 0,
            places,
        }
    }

    /// Rows of each latent.
    fn width(&self) -> usize {
        if self.glu_bias.is_some() { 2 } else { 1 }
    }

    fn mask(&self, t: usize) -> f32 {
        match &self.mask {
            None => 1.0,
            Some((DType::F32, mask)) => mask[t],
            Some((_, mask)) => (mask[t] != 0.0) as u8 as f32,
        }
    }

    fn scale(&self, k: usize) -> f32 {
        self.scale.as_ref().map_or(1.0, |s| s[k])
    }

    fn hidden_row(&self, t: usize) -> Vec<f64> {
        self.hidden[t * self.d_in..][..self.d_in].iter().map(|h| *h as f64).collect()
    }
}

/// A problem laid out for the device, and its calls.
struct Job {
    program: PathBuf,
    arena: Arena,
    rows: DeviceRows,
    packs: Vec<Launch>,
    hidden: Buffer,
    reference: Buffer,
    latents: Buffer,
    coef: Buffer,
    fused_coef: Option<Buffer>,
    /// loss, count and latent losses of the fused call, then of forward.
    sums: [[Buffer; 3]; 2],
    /// Of the fused call, then of backward.
    grads: [Buffer; 2],
    fused: PenaltyCall,
    forward: PenaltyCall,
    backward: BackwardCall,
    workspace: Workspace,
    scratch: Vec<Buffer>,
}

impl Job {
    fn new(p: &Problem) -> Job {
        Job::on(&harness().join("simt"), p)
    }

    fn on(program: &Path, p: &Problem) -> Job {
        let mut arena = Arena::new();
        let [hidden_at, latents_at, reference_at, mask_at, coef_at, grad_at, weight_at] = p.places;
        let weight = arena.filled(DType::F32, p.d_in, &p.weight, weight_at);
        let packed = arena.space(packed_bytes(p.count * p.width(), p.d_in));
        let (mut packs, mut scratch) = (Vec::new(), vec![packed]);
        let topk = match p.gate {
            GateKind::TopK => Some(rivals(&mut arena, p, &mut packs, &mut scratch)),
            _ => None,
        };
        let rows = DeviceRows {
            target: p.target,
            d_in: p.d_in,
            count: p.count,
            norm: p.norm,
            gate: p.gate,
            topk,
            packed: packed.address,
            bias: arena.vector(&p.bias).address,
            scale: p.scale.as_ref().map_or(0, |s| arena.vector(s).address),
            glu_bias: p.glu_bias.as_ref().map_or(0, |b| arena.vector(b).address),
            gate_values: match p.gate {
                GateKind::Open | GateKind::Relu => 0,
                GateKind::TopK => {
                    let gains = p.dictionary.blocked_gains();
                    gains.map_or(0, |gains| arena.vector(&gains).address)
                }
                _ => arena.vector(&p.gate_values).address,
            },
            sign_weight: arena.vector(&p.sign_weight).address,
        };
        arena.callers = arena.bytes.len();
        let hidden = arena.filled(p.hidden_dtype, p.d_in, &p.hidden, hidden_at);
        let reference = arena.filled(DType::F32, p.count, &p.reference, reference_at);
        let mask = p.mask.as_ref().map(|(dtype, mask)| {
            let buffer = arena.filled(*dtype, 1, mask, mask_at);
            Mask { data: buffer.pointer(), dtype: *dtype, stride: buffer.stride }
        });
        let latents = arena.matrix(DType::F32, p.tokens, p.count, latents_at);
        let coef = arena.matrix(DType::F32, p.tokens, p.count, coef_at);
        let fused_coef =
            p.keeps_coef.then(|| arena.matrix(DType::F32, p.tokens, p.count, Place::default()));
        let sums = [0, 1].map(|gap| {
            [1, 1, p.count].map(|n| arena.matrix(p.sums, n, 1, Place { gap, offset: 0 }))
        });
        let grads = [grad_at, Place::default()].map(|place| match p.accumulate {
            true => arena.filled(p.grad_dtype, p.d_in, &p.grad, place),
            false => arena.matrix(p.grad_dtype, p.tokens, p.d_in, place),
        });
        let factor = arena.vector(&[FACTOR.1]);
        packs.push(pack(weight.address, weight.stride, &rows));
        let size = workspace_size(&rows, p.tokens);
        let space = arena.space(size);
        scratch.push(space);
        let workspace = Workspace { data: space.pointer(), size };
        let grad = |n: usize| Grad {
            rows: grads[n].matrix(),
            accumulate: p.accumulate,
            scale: FACTOR.0,
            scale_tensor: Some(factor.pointer().cast::<f32>().cast_const()),
        };
        let fused = PenaltyCall {
            tokens: p.tokens,
            hidden: hidden.matrix(),
            reference: reference.matrix(),
            mask,
            coef: fused_coef.map(|b| b.matrix()),
            loss_sum: Some(sums[0][0].output()),
            token_count: Some(sums[0][1].output()),
            latent_loss: Some(sums[0][2].output()),
            grad: Some(grad(0)),
            workspace,
        };
        let forward = PenaltyCall {
            coef: Some(coef.matrix()),
            loss_sum: Some(sums[1][0].output()),
            token_count: Some(sums[1][1].output()),
            latent_loss: Some(sums[1][2].output()),
            grad: None,
            ..fused
        };
        let backward = BackwardCall {
            tokens: p.tokens,
            coef: coef.matrix(),
            grad: grad(1),
            hidden: (p.norm != TokenNorm::None || p.glu_bias.is_some()).then(|| hidden.matrix()),
            workspace,
        };
        Job {
            program: program.to_path_buf(),
            packs,
            arena,
            rows,
            hidden,
            reference,
            latents,
            coef,
            fused_coef,
            sums,
            grads,
            fused,
            forward,
            backward,
            workspace,
            scratch,
        }
    }

    /// z of every token; `masked` tokens have one too.
    fn encode(&self, p: &Problem) -> Vec<f32> {
        let call = EncodeCall {
            tokens: p.tokens,
            hidden: self.hidden.matrix(),
            latents: self.latents.matrix(),
            workspace: self.workspace,
        };
        let memory = self.run(&self.arena, encode(&self.rows, &call), &p.name);
        self.check_untouched(&memory, &[self.latents], p);
        self.latents.all(&memory).iter().map(|z| *z as f32).collect()
    }

    /// The fused call, then forward and backward. No kernel reads hidden states and references of
    /// tokens that do not count.
    fn penalty(&self, p: &Problem) -> Vec<u8> {
        let mut arena = self.arena.clone();
        for buffer in [&self.hidden, &self.reference] {
            arena.forbid(buffer, (0..p.tokens).filter(|t| p.mask(*t) == 0.0));
        }
        let fused = penalty(&self.rows, &self.fused);
        let forward = penalty(&self.rows, &self.forward);
        let backward = backward(&self.rows, &self.backward);
        let memory = self.run(&arena, fused.chain(forward).chain(backward), &p.name);
        let mut outputs = [&self.sums[0][..], &self.sums[1], &self.grads, &[self.coef]].concat();
        outputs.extend(self.fused_coef);
        self.check_untouched(&memory, &outputs, p);
        memory
    }

    /// Packs, then runs the launches.
    fn run(&self, arena: &Arena, launches: impl Iterator<Item = Launch>, name: &str) -> Vec<u8> {
        let launches: Vec<Launch> = self.packs.iter().copied().chain(launches).collect();
        run_orders(&self.program, arena, &launches, name)
    }

    /// Whatever is no output keeps its bytes.
    fn check_untouched(&self, memory: &[u8], outputs: &[Buffer], p: &Problem) {
        check_untouched(&self.arena, memory, &[outputs, &self.scratch].concat(), &p.name);
    }
}

/// Every order of threads must leave the same bytes.
fn run_orders(program: &Path, arena: &Arena, launches: &[Launch], name: &str) -> Vec<u8> {
    let memories =
        run(program, arena, launches).unwrap_or_else(|message| panic!("{name}\n{message}"));
    for (memory, order) in memories.iter().zip(ORDERS) {
        assert!(*memory == memories[0], "thread order {order} changes bits: {name}");
    }
    memories.into_iter().next().expect("there are orders")
}

fn check_untouched(arena: &Arena, memory: &[u8], written: &[Buffer], name: &str) {
    let mut before = arena.bytes.clone();
    for buffer in written {
        for t in 0..buffer.rows {
            let [start, bytes] = buffer.row(t);
            let range = (start - ADDRESS) as usize..(start - ADDRESS + bytes) as usize;
            before[range.clone()].copy_from_slice(&memory[range]);
        }
    }
    assert!(before == memory, "bytes beside the outputs changed: {name}");
}

/// A TopK gate's rivals in an arena, and the launches that pack them.
fn rivals(
    arena: &mut Arena,
    p: &Problem,
    packs: &mut Vec<Launch>,
    scratch: &mut Vec<Buffer>,
) -> DeviceTopK {
    let Dictionary { k, groups, group_size, by_magnitude, group, weight, .. } = &p.dictionary;
    let gains = p.dictionary.gain.as_deref();
    let glu_bias = p.dictionary.glu_bias.as_deref();
    let bias: Vec<f32> = match gains.filter(|_| glu_bias.is_none()) {
        Some(gains) => p.dictionary.bias.iter().zip(gains).map(|(b, gain)| b * gain).collect(),
        None => p.dictionary.bias.clone(),
    };
    let [at_once, tokens_at_once] = p.at_once;
    let group: Vec<f32> = group.iter().map(|g| f32::from_bits(*g)).collect();
    let mut gate = DeviceTopK {
        k: *k,
        groups: *groups,
        group_size: *group_size,
        by_magnitude: *by_magnitude,
        group: arena.vector(&group).address,
        packed: 0,
        bias: arena.vector(&bias).address,
        glu_bias: glu_bias.map_or(0, |bias| arena.vector(bias).address),
        gain: gains.map_or(0, |gains| arena.vector(gains).address),
        at_once,
        tokens_at_once,
    };
    let packed = arena.space(gate.packed_bytes(p.width(), p.d_in));
    gate.packed = packed.address;
    scratch.push(packed);
    let weight = arena.filled(DType::F32, p.d_in, weight, Place::default());
    for start in (0..gate.rivals()).step_by(at_once) {
        let from = weight.address + (start * p.width() * p.d_in * 4) as u64;
        packs.push(pack(from, p.d_in, &gate.part(start, p.d_in, p.target)));
    }
    gate
}

/// Compares each stage with f64 arithmetic on the output of the stage before.
fn check(p: &Problem) {
    check_job(p, &Job::new(p));
}

/// Returns z.
fn check_job(p: &Problem, job: &Job) -> Vec<f32> {
    let z = job.encode(p);
    let memory = job.penalty(p);
    let coef: Vec<f32> = job.coef.all(&memory).iter().map(|c| *c as f32).collect();
    let mut latent_loss = vec![0.0; p.count];
    let mut count = 0.0;
    for t in 0..p.tokens {
        let mask = p.mask(t);
        count += mask as f64;
        let token = Token::new(p, t);
        for k in 0..p.count {
            let (z, coef) = (z[t * p.count + k], coef[t * p.count + k]);
            let at = format!("[{t},{k}]: {}", p.name);
            let exact = Exact::new(p, k, &token);
            let clear = exact.distance.abs() > exact.slack;
            if clear {
                let expected = if exact.distance > 0.0 { exact.pre } else { 0.0 };
                assert!((z as f64 - expected).abs() <= exact.slack, "z {z} {expected} {at}");
            }
            if mask == 0.0 {
                assert_eq!(coef.to_bits(), 0, "coef {at}");
                continue;
            }
            let sw = p.sign_weight[k];
            let reference = p.reference[t * p.count + k];
            let x = if sw < 0.0 { reference - z } else { z - reference };
            let r = if x <= 0.0 { 0.0 } else { x };
            let on = mask * (2.0 * sw * r) * p.scale(k);
            let is_on = if clear { exact.distance > 0.0 } else { z != 0.0 };
            assert_eq!(coef, if is_on { on } else { 0.0 }, "coef {at}");
            latent_loss[k] += mask as f64 * (sw.abs() as f64 * (r as f64 * r as f64));
        }
        check_gradient_row(p, t, &token, &coef[t * p.count..][..p.count], |i| {
            job.grads[0].get(&memory, t, i)
        });
    }
    let tolerance = if p.sums == DType::F64 { 1e-13 } else { 1e-7 };
    let close = |x: f64, y: f64| (x - y).abs() <= tolerance * y.abs();
    for sums in &job.sums {
        let [loss, tokens, latents] = sums.map(|b| b.all(&memory));
        let expected: f64 = latent_loss.iter().sum();
        assert!(close(loss[0], expected), "loss {} {expected}: {}", loss[0], p.name);
        assert!(close(tokens[0], count), "count {} {count}: {}", tokens[0], p.name);
        for (k, (x, y)) in latents.iter().zip(&latent_loss).enumerate() {
            assert!(close(*x, *y), "latent_loss[{k}] {x} {y}: {}", p.name);
        }
    }
    let same = |x: &Buffer, y: &Buffer, what: &str| {
        let bits = |b: &Buffer| b.all(&memory).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(x), bits(y), "{what}, fused and in two calls: {}", p.name);
    };
    same(&job.grads[0], &job.grads[1], "dH");
    job.sums[0].iter().zip(&job.sums[1]).for_each(|(x, y)| same(x, y, "sums"));
    job.fused_coef.iter().for_each(|c| same(c, &job.coef, "coef"));
    z
}

/// A hidden state in f64, with what its latents have in common.
struct Token {
    hidden: Vec<f64>,
    /// a, mean and q of kernels/norm.cu
    scale: f64,
    mean: f64,
    slope: f64,
    /// Of each group, from the largest on.
    ranks: Vec<Vec<f64>>,
    /// What rounding may change in any of them.
    rank_slack: f64,
}

impl Token {
    fn new(p: &Problem, t: usize) -> Token {
        let hidden = p.hidden_row(t);
        let d = p.d_in as f64;
        let squares = |mean: f64| hidden.iter().map(|h| (h - mean) * (h - mean)).sum::<f64>();
        let mean = if p.norm == TokenNorm::Layer { hidden.iter().sum::<f64>() / d } else { 0.0 };
        let (scale, slope) = match p.norm {
            TokenNorm::None => (1.0, 0.0),
            TokenNorm::Constant => ((d / squares(0.0)).sqrt(), 1.0 / squares(0.0)),
            TokenNorm::Layer => {
                let deviation = (squares(mean) / (d - 1.0)).sqrt();
                let scale = 1.0 / (deviation + 1e-5);
                (scale, scale / ((d - 1.0) * deviation))
            }
        };
        let mut token = Token { hidden, scale, mean, slope, ranks: Vec::new(), rank_slack: 0.0 };
        if p.gate == GateKind::TopK {
            for group in 0..p.dictionary.groups {
                token.rank_group(p, group);
            }
        }
        token
    }

    fn rank_group(&mut self, p: &Problem, group: usize) {
        let Dictionary { group_size, weight, bias, glu_bias, .. } = &p.dictionary;
        let rivals = group * group_size..(group + 1) * group_size;
        let mut ranks = Vec::new();
        for rival in rivals {
            let (pre, size) = match glu_bias {
                Some(glu_bias) => self.glu(weight, bias, glu_bias, rival).pre(),
                None => {
                    let (dot, size) = self.dot(&weight[rival * p.d_in..][..p.d_in]);
                    (dot + bias[rival] as f64, size + bias[rival].abs() as f64)
                }
            };
            let gain = p.dictionary.gain(rival);
            ranks.push(p.dictionary.rank(gain * pre));
            self.rank_slack = self.rank_slack.max(slack(gain.max(1.0) * size));
        }
        ranks.sort_by(|x, y| y.total_cmp(x));
        self.ranks.push(ranks);
    }

    /// a · (row · h), and the size of its products.
    fn dot(&self, row: &[f32]) -> (f64, f64) {
        let products = || row.iter().zip(&self.hidden).map(|(w, h)| *w as f64 * h);
        let size: f64 = products().map(f64::abs).sum();
        (self.scale * products().sum::<f64>(), self.scale * size)
    }
}

/// A latent of a GLU encoder: u = value · σ(gate), and the sizes of what value and gate add up.
struct Glu {
    value: f64,
    sigmoid: f64,
    /// σ(gate) σ(−gate)
    slope: f64,
    value_size: f64,
    gate_size: f64,
}

impl Glu {
    /// u and its size.
    fn pre(&self) -> (f64, f64) {
        let size = self.value_size * self.sigmoid + self.value.abs() * self.slope * self.gate_size;
        (self.value * self.sigmoid, size)
    }

    /// What a coefficient is multiplied by for each of the two rows, and its size.
    fn coefs(&self) -> [(f64, f64); 2] {
        let of_gate = self.value.abs() * self.slope * self.gate_size;
        [
            (self.sigmoid, self.sigmoid + self.slope * self.gate_size),
            (self.value * self.slope, self.value_size * self.slope + of_gate),
        ]
    }
}

impl Token {
    fn glu(&self, weight: &[f32], bias: &[f32], glu_bias: &[f32], k: usize) -> Glu {
        let d = self.hidden.len();
        let sum = |row: usize, bias: f32| {
            let (dot, size) = self.dot(&weight[row * d..][..d]);
            (dot + bias as f64, size + bias.abs() as f64)
        };
        let (value, value_size) = sum(2 * k, bias[k]);
        let (gate, gate_size) = sum(2 * k + 1, glu_bias[k]);
        let sigmoid = 1.0 / (1.0 + (-gate).exp());
        let slope = sigmoid / (1.0 + gate.exp());
        Glu { value, sigmoid, slope, value_size, gate_size }
    }
}

/// What rounding may change in a sum of products of this size.
fn slack(size: f64) -> f64 {
    1e-6 * size + 1e-9
}

/// One latent of one token in f64.
struct Exact {
    pre: f64,
    /// How far the gate is from switching.
    distance: f64,
    /// What rounding may change.
    slack: f64,
}

impl Exact {
    fn new(p: &Problem, k: usize, token: &Token) -> Exact {
        let gate = p.gate_values[k] as f64;
        let (dot, size) = token.dot(&p.weight[k * p.width() * p.d_in..][..p.d_in]);
        let scale = p.scale(k) as f64;
        let (pre, size) = match &p.glu_bias {
            Some(glu_bias) => token.glu(&p.weight, &p.bias, glu_bias, k).pre(),
            None => {
                let pre = dot * scale + p.bias[k] as f64;
                (pre, size * scale.max(1.0) + p.bias[k].abs() as f64)
            }
        };
        let size = size + gate.abs();
        let distance = match p.gate {
            GateKind::Open => f64::INFINITY,
            GateKind::Relu => pre,
            GateKind::Threshold => pre - gate,
            GateKind::Gated => pre.min(dot + gate),
            GateKind::TopK => Exact::place(p, k, pre, token),
        };
        Exact { pre, distance, slack: slack(size) + token.rank_slack }
    }

    /// From the rank that is nearest on the other side of the k-th place; with relu also from 0.
    fn place(p: &Problem, k: usize, pre: f64, token: &Token) -> f64 {
        let ranks = &token.ranks[p.dictionary.group[k] as usize];
        let next = ranks.get(p.dictionary.k).copied().unwrap_or(f64::NEG_INFINITY);
        let own = p.dictionary.rank(p.dictionary.gain(p.dictionary.rival[k]) * pre);
        let place = if own > next { own - next } else { own - ranks[p.dictionary.k - 1] };
        if p.dictionary.by_magnitude { place } else { place.min(pre) }
    }
}

/// dH of one token against its coefficients.
fn check_gradient_row(
    p: &Problem,
    t: usize,
    token: &Token,
    coef: &[f32],
    new: impl Fn(usize) -> f64,
) {
    let active = coef.iter().any(|c| *c != 0.0);
    // Half a unit in the last place, and the products that 16-bit results leave out.
    let (unit, left_out) = match p.grad_dtype {
        DType::BF16 => (0.5f64.powi(8), 0.5f64.powi(15)),
        DType::F16 => (0.5f64.powi(11), 0.5f64.powi(15)),
        _ => (0.5f64.powi(24), 0.0),
    };
    let factors = coef.iter().map(|c| FACTOR.0 * FACTOR.1 as f64 * *c as f64);
    let factors = factors.enumerate().filter(|(_, f)| *f != 0.0);
    // Of each row that takes part, and the size of what it was made of.
    let factors: Vec<(&[f32], f64, f64)> = factors
        .flat_map(|(k, factor)| {
            let coefs = match &p.glu_bias {
                Some(glu_bias) => token.glu(&p.weight, &p.bias, glu_bias, k).coefs().to_vec(),
                None => vec![(1.0, 1.0)],
            };
            let rows = p.weight[k * p.width() * p.d_in..].chunks_exact(p.d_in);
            let of_row = move |(row, (c, size))| (row, factor * c, factor.abs() * size);
            rows.zip(coefs).map(of_row)
        })
        .collect();
    let (mut pull, mut pull_size) = (0.0, 0.0);
    for (row, factor, factor_size) in &factors {
        let (dot, size) = token.dot(row);
        pull += token.slope * factor * dot;
        pull_size += token.slope.abs() * factor_size * size;
    }
    for i in 0..p.d_in {
        let old = if p.accumulate { p.grad[t * p.d_in + i] as f64 } else { 0.0 };
        let centred = if factors.is_empty() { 0.0 } else { token.hidden[i] - token.mean };
        let (mut sum, mut size) = (-pull * centred, pull_size * centred.abs());
        for (row, factor, factor_size) in &factors {
            sum += token.scale * factor * row[i] as f64;
            size += token.scale * factor_size * row[i].abs() as f64;
        }
        let (new, expected) = (new(i), old + sum);
        let slack = unit * 1.001 * expected.abs() + (1e-6 + left_out) * (size + old.abs()) + 1e-7;
        assert!((new - expected).abs() <= slack, "dH[{t},{i}] {new} {expected}: {}", p.name);
        assert!(active || new == old, "a row without violation changed: {}", p.name);
    }
}

const TOKENS: [usize; 6] = [1, 17, 64, 65, 200, 0];
const WIDTHS: [usize; 8] = [1, 7, 63, 64, 65, 100, 520, 1030];
const COUNTS: [usize; 9] = [1, 3, 8, 12, 20, 30, 33, 70, 130];

/// Every size at least twice, with everything else at random.
fn problems(hidden_dtype: DType) -> impl Iterator<Item = Problem> {
    let mut random = Random::fresh();
    (0..18).map(move |i| {
        let shape = [TOKENS[i % 6], WIDTHS[(i + i / 6) % 8], COUNTS[(i + i / 9) % 9]];
        Problem::random(&mut random, hidden_dtype, shape)
    })
}

#[test]
fn parameter_structs_are_laid_out_alike() {
    let output = Command::new(harness().join("simt")).arg("layout").output().expect("it starts");
    assert_eq!(String::from_utf8_lossy(&output.stdout), layout());
}

#[test]
fn every_kernel_is_compiled_and_no_other() {
    let output = Command::new(harness().join("simt")).arg("kernels").output().expect("it starts");
    let text = String::from_utf8(output.stdout).expect("plain names");
    let mut compiled: Vec<&str> = text.lines().collect();
    let mut named: Vec<&str> =
        Kernel::ALL.iter().map(|k| k.name().to_str().expect("a plain name")).collect();
    compiled.sort();
    named.sort();
    assert_eq!(compiled, named);
}

#[test]
fn f32_kernels_are_right() {
    problems(DType::F32).for_each(|p| check(&p));
}

#[test]
fn f16_kernels_are_right() {
    problems(DType::F16).for_each(|p| check(&p));
}

#[test]
fn bf16_kernels_are_right() {
    problems(DType::BF16).for_each(|p| check(&p));
}

/// With as many tiles of tokens the blocks of a cluster share packed rows: four, or two of them.
#[test]
fn clusters_that_share_rows_are_right() {
    let mut random = Random::fresh();
    for (dtype, shape) in REAL.into_iter().zip([[500, 130, 70], [700, 65, 33], [1000, 70, 40]]) {
        let gate = random.pick(&[GateKind::Threshold, GateKind::Gated]);
        let mut p = Problem::of(&mut random, dtype, shape, gate, TokenNorm::None);
        p.target = Target::Sm90 { clusters: [1, 1] };
        p.name = format!("in clusters, {}", p.name);
        check(&p);
    }
}

/// The same problem for some of its tokens and latents, in that order, elsewhere in memory.
fn part(random: &mut Random, p: &Problem, tokens: &[usize], latents: &[usize]) -> Problem {
    let shape = [tokens.len(), p.d_in, latents.len()];
    let fresh = Problem::of(random, p.hidden_dtype, shape, p.gate, p.norm);
    let of_latents = |x: &[f32]| latents.iter().map(|k| x[*k]).collect::<Vec<f32>>();
    let rows = |x: &[f32], cols: usize, which: &[usize]| -> Vec<f32> {
        which.iter().flat_map(|n| x[n * cols..][..cols].to_vec()).collect()
    };
    Problem {
        name: format!("tokens {tokens:?}, latents {latents:?} of {}", p.name),
        weight: rows(&p.weight, p.width() * p.d_in, latents),
        bias: of_latents(&p.bias),
        scale: p.scale.as_deref().map(of_latents),
        glu_bias: p.glu_bias.as_deref().map(of_latents),
        gate_values: of_latents(&p.gate_values),
        dictionary: Dictionary {
            group: latents.iter().map(|k| p.dictionary.group[*k]).collect(),
            rival: latents.iter().map(|k| p.dictionary.rival[*k]).collect(),
            ..p.dictionary.clone()
        },
        sign_weight: of_latents(&p.sign_weight),
        hidden: rows(&p.hidden, p.d_in, tokens),
        grad: rows(&p.grad, p.d_in, tokens),
        accumulate: p.accumulate,
        grad_dtype: p.grad_dtype,
        mask: None,
        target: p.target,
        ..fresh
    }
}

const REAL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Narrow and wide kernels, aligned and not, alone and among others: all give a token's z.
#[test]
fn a_latent_depends_on_its_own_token_and_row_only() {
    let mut random = Random::fresh();
    for dtype in REAL {
        let p = Problem::random(&mut random, dtype, [70, 584, 66]);
        let whole = Job::new(&p).encode(&p);
        let shuffled: Vec<usize> = (0..p.tokens).rev().collect();
        let parts: [(&[usize], &[usize]); 4] = [
            (&[69], &[65]),
            (&shuffled, &[1, 64, 7]),
            (&[5, 5, 5], &[2; 20]),
            (&[3; 66], &[9; 65]),
        ];
        for (tokens, latents) in parts {
            let q = part(&mut random, &p, tokens, latents);
            let z = Job::new(&q).encode(&q);
            for (n, z) in z.iter().enumerate() {
                let (t, k) = (tokens[n / latents.len()], latents[n % latents.len()]);
                assert_eq!(z.to_bits(), whole[t * p.count + k].to_bits(), "[{t},{k}]: {}", q.name);
            }
        }
    }
}

/// Many tokens go to kernels of their own. Few of them count here: whole tiles are passed over.
#[test]
fn tall_kernels_are_right_and_give_the_same_latents() {
    let mut random = Random::fresh();
    let tokens = (1 << 14) + 1;
    let some = [0, 16, 64, 127, 5000, tokens - 1];
    for dtype in [DType::F16, DType::BF16] {
        for (count, d_in) in [(5, 70), (16, 9), (20, 9), (32, 9)] {
            let gate = random.pick(&[GateKind::Threshold, GateKind::Gated]);
            let norm = random.pick(&[TokenNorm::None, TokenNorm::Layer]);
            let mut p = Problem::of(&mut random, dtype, [tokens, d_in, count], gate, norm);
            p.target = Target::Portable;
            if gate == GateKind::Threshold && count == 16 {
                p = p.with_glu(&mut random);
            }
            let counts = |t: usize| (t < 150 || some.contains(&t)) as u8 as f32;
            p.mask = Some((DType::U8, (0..tokens).map(counts).collect()));
            let whole = check_job(&p, &Job::new(&p));
            let q = part(&mut random, &p, &some, &[count - 1, 0]);
            for (n, z) in Job::new(&q).encode(&q).iter().enumerate() {
                let (t, k) = (some[n / 2], [count - 1, 0][n % 2]);
                assert_eq!(z.to_bits(), whole[t * count + k].to_bits(), "[{t},{k}]: {}", q.name);
            }
        }
    }
}

/// dH of a token depends on its own coefficients only, wherever it stands.
#[test]
fn a_gradient_row_depends_on_its_own_token_only() {
    let mut random = Random::fresh();
    for (dtype, count) in [(DType::F32, 20), (DType::F16, 40), (DType::BF16, 40), (DType::BF16, 7)]
    {
        let mut p = Problem::random(&mut random, dtype, [130, 72, count]);
        p.mask = None;
        let job = Job::new(&p);
        let memory = job.penalty(&p);
        let latents: Vec<usize> = (0..count).collect();
        for t in [0, 129, 77] {
            let mut q = part(&mut random, &p, &[t], &latents);
            q.reference = p.reference[t * count..][..count].to_vec();
            let alone = Job::new(&q);
            let row = alone.penalty(&q);
            for i in 0..p.d_in {
                let (x, y) = (alone.grads[0].get(&row, 0, i), job.grads[0].get(&memory, t, i));
                assert_eq!(x.to_bits(), y.to_bits(), "dH[{t},{i}]: {}", q.name);
            }
        }
    }
}

/// Encode and the penalty see the same z: a reference that encode wrote costs nothing, and rows of
/// dH are then neither read nor written.
#[test]
fn equal_hidden_states_cost_nothing_and_touch_nothing() {
    let mut random = Random::fresh();
    for (dtype, count) in [(DType::F32, 24), (DType::F16, 50), (DType::BF16, 12), (DType::BF16, 80)]
    {
        let mut p = Problem::random(&mut random, dtype, [66, 200, count]);
        p.accumulate = true;
        p.reference = Job::new(&p).encode(&p);
        let mut job = Job::new(&p);
        job.grads.iter().for_each(|grad| job.arena.forbid(grad, 0..p.tokens));
        let memory = job.penalty(&p);
        for sums in &job.sums {
            assert_eq!(sums[0].get(&memory, 0, 0), 0.0, "{}", p.name);
        }
        assert!(job.coef.all(&memory).iter().all(|c| *c == 0.0), "{}", p.name);
    }
}

/// Ties, infinities, NaN, subnormals, all equal: each latent that is not below the k-th place is on,
/// in parts of any size.
#[test]
fn latents_that_share_the_kth_place_are_on() {
    let mut random = Random::fresh();
    let tiny = f32::from_bits(1);
    let special = [0.0, tiny, -tiny, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, 1.0];
    let kinds: [&[f32]; 4] = [&special, &[2.0], &[-1.0, -2.0], &[f32::NAN, 3.0, -3.0, 0.5]];
    for (values, count, groups, group_size) in
        kinds.iter().flat_map(|kind| [(kind, 5, 1, 300), (kind, 7, 3, 37), (kind, 6, 3, 2)])
    {
        let (gate, norm) = (GateKind::TopK, TokenNorm::None);
        let mut p = Problem::of(&mut random, DType::BF16, [2, 1, count], gate, norm);
        let rivals = groups * group_size;
        let among = |random: &mut Random| match random.below(3) {
            0 => random.normal(),
            _ => random.pick(values),
        };
        let group: Vec<u32> = (0..count).map(|k| (k % groups) as u32).collect();
        p.dictionary = Dictionary {
            k: 1 + random.below(group_size),
            groups,
            group_size,
            by_magnitude: random.below(2) == 0,
            rival: last_rivals(&group, group_size),
            group,
            weight: vec![0.0; rivals],
            glu_bias: None,
            gain: None,
            bias: (0..rivals).map(|_| among(&mut random)).collect(),
        };
        (p.weight, p.bias) = p.dictionary.blocked();
        p.at_once = [random.pick(&[8, 104, 2048]), 1 + random.below(2)];
        p.name = format!("{:?}, in parts of {}, biases {:?}", p.dictionary, p.at_once[0], p.bias);
        let z = Job::new(&p).encode(&p);
        for (n, z) in z.iter().enumerate() {
            let (own, group) = (p.bias[n % count] as f64, n % count % groups);
            let Dictionary { k, bias, by_magnitude, .. } = &p.dictionary;
            let ranks = bias[group * group_size..][..group_size].iter();
            let mut ranks: Vec<f64> = ranks.map(|b| p.dictionary.rank(*b as f64)).collect();
            ranks.sort_by(|x, y| y.total_cmp(x));
            let lost = p.dictionary.rank(own) < ranks[k - 1] || (!by_magnitude && own <= 0.0);
            let expected = if lost { 0.0 } else { own as f32 };
            let same = z.to_bits() == expected.to_bits() || (z.is_nan() && expected.is_nan());
            assert!(same || *z == expected, "z[{n}] {z} {expected}: {}", p.name);
        }
    }
}

/// A problem's rows as a whole dictionary, or all latents of its TopK SAE, in an arena with the
/// hidden states of two models.
struct StatsJob {
    arena: Arena,
    dictionary: DeviceDictionary,
    packs: Vec<Launch>,
    call: StatsCall,
    state: Buffer,
    token_count: Buffer,
    scratch: Vec<Buffer>,
    /// Column of each of the problem's latents.
    columns: Vec<usize>,
}

impl StatsJob {
    fn new(random: &mut Random, p: &Problem, base: Option<&Problem>) -> StatsJob {
        let mut arena = Arena::new();
        let is_topk = p.gate == GateKind::TopK;
        let Dictionary { group_size, groups, k, by_magnitude, .. } = p.dictionary;
        let (weight, bias, glu_bias) = match is_topk {
            true => (&p.dictionary.weight, &p.dictionary.bias, &p.dictionary.glu_bias),
            false => (&p.weight, &p.bias, &p.glu_bias),
        };
        let gains = p.dictionary.gain.as_deref().filter(|_| is_topk);
        let count = bias.len();
        let half = count.div_ceil(2).next_multiple_of(8);
        let mut dictionary = DeviceDictionary {
            at_once: random.pick(&[2048, half]),
            tokens_at_once: random.pick(&[4096, 33]),
            ..DeviceDictionary::new(p.d_in, count, p.norm, p.gate)
        };
        let packed = arena.space(dictionary.packed_bytes(p.width()));
        let rows = &mut dictionary.rows;
        (rows.packed, rows.bias) = (packed.address, arena.vector(bias).address);
        rows.scale = p.scale.as_ref().map_or(0, |scale| arena.vector(scale).address);
        rows.glu_bias = glu_bias.as_ref().map_or(0, |bias| arena.vector(bias).address);
        rows.gate_values = match p.gate {
            GateKind::Open | GateKind::Relu => 0,
            GateKind::TopK => gains.map_or(0, |gains| arena.vector(gains).address),
            _ => arena.vector(&p.gate_values).address,
        };
        rows.target = p.target;
        if is_topk {
            let group = (0..count).map(|rival| f32::from_bits((rival / group_size) as u32));
            let scales = gains.filter(|_| glu_bias.is_none());
            let gain = |rival: usize| scales.map_or(1.0, |gains| gains[rival]);
            let scaled: Vec<f32> = (0..count).map(|rival| bias[rival] * gain(rival)).collect();
            rows.topk = Some(DeviceTopK {
                k,
                groups,
                group_size,
                by_magnitude,
                group: arena.vector(&group.collect::<Vec<f32>>()).address,
                packed: rows.packed,
                bias: arena.vector(&scaled).address,
                glu_bias: rows.glu_bias,
                gain: rows.gate_values,
                at_once: dictionary.at_once,
                tokens_at_once: dictionary.tokens_at_once,
            });
        }
        let weight = arena.filled(DType::F32, p.d_in, weight, Place::default());
        let starts = (0..count).step_by(dictionary.at_once);
        let from = |start: usize| weight.address + (start * p.width() * p.d_in * 4) as u64;
        let packs = starts.map(|start| pack(from(start), p.d_in, &dictionary.part(start)));
        let hidden = |arena: &mut Arena, p: &Problem| {
            let buffer = arena.filled(p.hidden_dtype, p.d_in, &p.hidden, p.places[0]);
            // No kernel reads hidden states of tokens that do not count.
            arena.forbid(&buffer, (0..p.tokens).filter(|t| p.mask(*t) == 0.0));
            buffer.matrix()
        };
        let packs = packs.collect();
        arena.callers = arena.bytes.len();
        let (own, base) = (hidden(&mut arena, p), base.map(|base| hidden(&mut arena, base)));
        let mask = p.mask.as_ref().map(|(dtype, mask)| {
            let buffer = arena.filled(*dtype, 1, mask, p.places[3]);
            Mask { data: buffer.pointer(), dtype: *dtype, stride: buffer.stride }
        });
        let height = if base.is_some() { stats_rows::WITH_BASE } else { stats_rows::ALONE };
        let state = arena.matrix(DType::F64, height, count, Place { gap: 3, offset: 1 });
        let token_count = arena.matrix(DType::F64, 1, 1, Place::default());
        let size = stats_workspace_size(&dictionary, p.tokens, base.is_some());
        let space = arena.space(size);
        StatsJob {
            call: StatsCall {
                tokens: p.tokens,
                hidden: own,
                base_hidden: base,
                mask,
                state: state.matrix(),
                token_count: Some(token_count.pointer().cast()),
                accumulate: false,
                workspace: Workspace { data: space.pointer(), size },
            },
            columns: if is_topk { p.dictionary.rival.clone() } else { (0..count).collect() },
            arena,
            dictionary,
            packs,
            state,
            token_count,
            scratch: vec![packed, space],
        }
    }

    /// The call in two: the first `cut` tokens, then the others.
    fn in_two(&self, cut: usize) -> [StatsCall; 2] {
        let matrix = |matrix: Matrix| {
            let bytes = cut * matrix.row_stride * matrix.dtype.size();
            Matrix { data: matrix.data.wrapping_add(bytes), ..matrix }
        };
        let mask = |mask: Mask| {
            let bytes = cut * mask.stride * mask.dtype.size();
            Mask { data: mask.data.wrapping_add(bytes), ..mask }
        };
        let rest = StatsCall {
            tokens: self.call.tokens - cut,
            hidden: matrix(self.call.hidden),
            base_hidden: self.call.base_hidden.map(matrix),
            mask: self.call.mask.map(mask),
            accumulate: true,
            ..self.call
        };
        [StatsCall { tokens: cut, ..self.call }, rest]
    }

    fn run(&self, program: &Path, calls: &[StatsCall], name: &str) -> Vec<u8> {
        let work = calls.iter().flat_map(|call| statistics(&self.dictionary, call));
        let launches: Vec<Launch> = self.packs.iter().copied().chain(work).collect();
        let memory = run_orders(program, &self.arena, &launches, name);
        let written = [&self.scratch[..], &[self.state, self.token_count]].concat();
        check_untouched(&self.arena, &memory, &written, name);
        memory
    }
}

/// The formulas of src/stats.rs on z of one latent, in the order of the tokens.
fn sums_of(p: &Problem, k: usize, z: &[f32], base: Option<&[f32]>) -> Vec<f64> {
    let side = [0.0, 0.0, 0.0, f64::NEG_INFINITY];
    let mut sums = side.to_vec();
    if base.is_some() {
        sums.extend(side);
        sums.extend([0.0, 0.0]);
    }
    for t in (0..p.tokens).filter(|t| p.mask(*t) != 0.0) {
        let (m, at) = (p.mask(t) as f64, t * p.count + k);
        for (first, z) in [(0, Some(z[at])), (stats_rows::BASE_SUM, base.map(|base| base[at]))] {
            let Some(z) = z.map(f64::from) else { continue };
            sums[first + stats_rows::SUM] += m * z;
            sums[first + stats_rows::SQUARE_SUM] += m * (z * z);
            sums[first + stats_rows::ACTIVE] += if z != 0.0 { m } else { 0.0 };
            let max = &mut sums[first + stats_rows::MAX];
            *max = if z > *max || z.is_nan() { z } else { *max };
        }
        if let Some(base) = base {
            let rise = z[at] - base[at];
            let square = m * (rise as f64 * rise as f64);
            let up = rise > 0.0;
            sums[if up { stats_rows::RISE_SQUARE_SUM } else { stats_rows::FALL_SQUARE_SUM }] +=
                square;
        }
    }
    sums
}

fn check_statistics(random: &mut Random, p: &Problem, program: &Path) {
    let other = random.normals(p.tokens * p.d_in);
    let other = other.into_iter().map(|x| round(p.hidden_dtype, x)).collect();
    let other = Problem { hidden: other, ..p.clone() };
    let (z, z_base) = (Job::new(p).encode(p), Job::new(&other).encode(&other));
    for base in [None, Some(&other)] {
        let job = StatsJob::new(random, p, base);
        let name = format!("{}, parts of {}", p.name, job.dictionary.at_once);
        let memory = job.run(program, &[job.call], &name);
        for (k, column) in job.columns.iter().enumerate() {
            let expected = sums_of(p, k, &z, base.map(|_| &z_base[..]));
            for (row, expected) in expected.iter().enumerate() {
                let found = job.state.get(&memory, row, *column);
                let same = found.to_bits() == expected.to_bits();
                assert!(same, "row {row} of latent {k}: {found} {expected}: {name}");
            }
        }
        let shares = (0..p.tokens).map(|t| p.mask(t) as f64).filter(|m| *m != 0.0);
        let count = job.token_count.get(&memory, 0, 0);
        assert_eq!(count, shares.fold(0.0, |sum, m| sum + m), "count: {name}");
        let in_two = job.run(program, &job.in_two(random.below(p.tokens + 1)), &name);
        for buffer in [job.state, job.token_count] {
            let bits = |memory| buffer.all(memory).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&memory), bits(&in_two), "in two calls: {name}");
        }
    }
}

#[test]
fn statistics_are_sums_of_the_latents() {
    let mut random = Random::fresh();
    let gates = [
        (GateKind::Relu, TokenNorm::None),
        (GateKind::Threshold, TokenNorm::Constant),
        (GateKind::Gated, TokenNorm::Layer),
        (GateKind::TopK, TokenNorm::None),
        (GateKind::TopK, TokenNorm::Layer),
    ];
    for (i, (gate, norm)) in gates.into_iter().enumerate() {
        let shape = [[70, 40, 20], [1, 65, 70], [130, 7, 33], [40, 30, 12], [35, 20, 9]][i];
        let p = Problem::of(&mut random, REAL[i % 3], shape, gate, norm);
        check_statistics(&mut random, &p, &harness().join("simt"));
        if gate != GateKind::Gated {
            let p = p.with_glu(&mut random);
            check_statistics(&mut random, &p, &harness().join("simt"));
        }
    }
}

#[test]
fn statistics_of_no_token_begin_a_state() {
    let mut random = Random::fresh();
    let p = Problem::of(&mut random, DType::F32, [0, 20, 70], GateKind::Relu, TokenNorm::None);
    check_statistics(&mut random, &p, &harness().join("simt"));
}

/// A batch in an arena, in either order of its leading dimensions, with a position that belongs to
/// nobody after each of the inner ones; directions, and a condition for each row.
struct SteerJob {
    name: String,
    arena: Arena,
    directions: DeviceDirections,
    /// [count, d_in]
    vectors: Vec<f32>,
    hidden: Buffer,
    batch_is_inner: bool,
    rows: Vec<i64>,
    strengths: Vec<f32>,
    shares: Option<Vec<f32>>,
    call: SteerCall,
}

impl SteerJob {
    const COUNT: usize = 3;

    fn new(random: &mut Random, dtype: DType, [batch, positions, d_in]: [usize; 3]) -> SteerJob {
        let seed = *random;
        let mut arena = Arena::new();
        let vectors = random.normals(SteerJob::COUNT * d_in);
        let padded: Vec<f32> = vectors
            .chunks(d_in)
            .flat_map(|row| {
                let mut row = row.to_vec();
                row.resize(DeviceDirections::stride(d_in), 0.0);
                row
            })
            .collect();
        let rows_at = arena.vector(&padded).address;
        let directions = DeviceDirections { d_in, count: SteerJob::COUNT, rows: rows_at };
        let aligned = d_in.next_multiple_of(8) - d_in;
        let gap = random.pick(&[aligned, aligned, aligned + 64, 1, 0]);
        let place = Place { gap, offset: random.pick(&[0, 0, 3]) };
        let batch_is_inner = random.below(2) == 0;
        let [outer, inner] = if batch_is_inner { [positions, batch] } else { [batch, positions] };
        let values = random.normals(outer * (inner + 1) * d_in);
        let values: Vec<f32> = values.into_iter().map(|x| round(dtype, 20.0 * x)).collect();
        let hidden = arena.filled(dtype, d_in, &values, place);
        let strides = [hidden.stride, (inner + 1) * hidden.stride];
        let [hidden_stride, row_stride] =
            if batch_is_inner { strides } else { [strides[1], strides[0]] };
        let beyond = [-1, 0, 1, 2, 3, i64::MIN, 1 << 32];
        let rows: Vec<i64> = (0..batch).map(|_| random.pick(&beyond)).collect();
        let row = arena.matrix(DType::I64, batch, 1, Place { gap: 1, offset: 0 });
        for (b, value) in rows.iter().enumerate() {
            let at = row.at(b, 0);
            arena.bytes[at..][..8].copy_from_slice(&value.to_le_bytes());
        }
        let strengths: Vec<f32> = (0..batch).map(|_| random.pick(&[0.0, 0.7, -2.5])).collect();
        let strength = arena.filled(DType::F32, 1, &strengths, Place { gap: 2, offset: 0 });
        let mask_dtype = random.pick(&[DType::U8, DType::F32]);
        let some: &[f32] =
            if mask_dtype == DType::F32 { &[0.0, 1.0, 0.37] } else { &[0.0, 1.0, 7.0] };
        let mask: Option<Vec<f32>> = (random.below(3) > 0)
            .then(|| (0..batch * positions).map(|_| random.pick(some)).collect());
        let masked = mask
            .as_ref()
            .filter(|mask| !mask.is_empty())
            .map(|mask| arena.filled(mask_dtype, positions, mask, Place { gap: 5, offset: 0 }));
        let share = |m: &f32| if mask_dtype == DType::F32 { *m } else { (*m != 0.0) as u8 as f32 };
        let factor = arena.vector(&[FACTOR.1]);
        SteerJob {
            name: format!("{batch} x {positions} x {d_in}, {dtype:?}, {place:?}, {seed:?}"),
            call: SteerCall {
                batch,
                positions,
                hidden: Matrix { row_stride, ..hidden.matrix() },
                hidden_stride,
                row: Column { data: row.pointer().cast(), stride: row.stride },
                strength: Column { data: strength.pointer().cast(), stride: strength.stride },
                mask: masked.map(|m| Mask { data: m.pointer(), dtype: mask_dtype, stride: 1 }),
                mask_stride: masked.map_or(0, |m| m.stride),
                scale: FACTOR.0,
                scale_tensor: Some(factor.pointer().cast::<f32>().cast_const()),
            },
            arena,
            directions,
            vectors,
            hidden,
            batch_is_inner,
            rows,
            strengths,
            shares: mask.map(|mask| mask.iter().map(share).collect()),
        }
    }

    /// Of a position, where it is in the buffer.
    fn place(&self, b: usize, s: usize) -> usize {
        let SteerCall { batch, positions, .. } = self.call;
        if self.batch_is_inner { s * (batch + 1) + b } else { b * (positions + 1) + s }
    }

    /// What a position's direction is multiplied by; NaN where there is none, if it is pushed.
    fn factor(&self, b: usize, s: usize) -> Option<f32> {
        let share = self.shares.as_ref().map_or(1.0, |m| m[b * self.call.positions + s]);
        let (row, strength) = (self.rows[b], self.strengths[b]);
        let is_known = (0..SteerJob::COUNT as i64).contains(&row);
        if share == 0.0 || row == -1 || (is_known && strength == 0.0) {
            return None;
        }
        let scale = FACTOR.0 * FACTOR.1 as f64;
        Some(if is_known { (strength as f64 * scale * share as f64) as f32 } else { f32::NAN })
    }

    fn check(&self, program: &Path) {
        let SteerCall { batch, positions, .. } = self.call;
        let all = || (0..batch).flat_map(|b| (0..positions).map(move |s| (b, s)));
        let pushed: Vec<(usize, usize)> =
            all().filter(|(b, s)| self.factor(*b, *s).is_some()).collect();
        let places: HashSet<usize> = pushed.iter().map(|(b, s)| self.place(*b, *s)).collect();
        let mut arena = self.arena.clone();
        // No kernel reads or writes a position that is not pushed.
        arena.forbid(&self.hidden, (0..self.hidden.rows).filter(|row| !places.contains(row)));
        let launch = steer(&self.directions, &self.call).expect("there are positions");
        let tiles = self.directions.d_in.div_ceil(1024) as u32;
        assert_eq!(launch.grid, [batch as u32 * positions as u32 * tiles, 1, 1]);
        // Fewer blocks, which take more than one position each.
        let few = Launch { grid: [tiles * (batch * positions).min(2) as u32, 1, 1], ..launch };
        for launch in [launch, few] {
            let memory = run_orders(program, &arena, &[launch], &self.name);
            check_untouched(&arena, &memory, &[self.hidden], &self.name);
            for (b, s) in &pushed {
                let (at, factor) = (self.place(*b, *s), self.factor(*b, *s).unwrap_or(0.0));
                let row = self.rows[*b].clamp(0, SteerJob::COUNT as i64 - 1) as usize;
                let direction = &self.vectors[row * self.hidden.cols..][..self.hidden.cols];
                for (i, x) in direction.iter().enumerate() {
                    let before = self.hidden.get(&arena.bytes, at, i) as f32;
                    let expected = round(self.hidden.dtype, factor.mul_add(*x, before)) as f64;
                    let found = self.hidden.get(&memory, at, i);
                    let same = found.to_bits() == expected.to_bits()
                        || (found.is_nan() && expected.is_nan());
                    assert!(same, "h[{b},{s},{i}]: {found} {expected}: {}", self.name);
                }
            }
        }
    }
}

/// Every dtype, mask and layout; one of the shapes has several tiles of columns.
fn check_steering(random: &mut Random, program: &Path) {
    for i in 0..9 {
        let shape = [[6, 5, 43], [7, 2, 130], [5, 1, 7], [3, 2, 1030], [1, 1, 1]][i % 5];
        SteerJob::new(random, REAL[i % 3], shape).check(program);
    }
}

#[test]
fn steering_has_the_bits_of_the_formula() {
    let mut random = Random::fresh();
    for _ in 0..3 {
        check_steering(&mut random, &harness().join("simt"));
    }
    let nothing = SteerJob::new(&mut random, DType::F32, [4, 0, 5]);
    assert!(steer(&nothing.directions, &nothing.call).is_none());
}

#[test]
fn wrong_steering_is_caught() {
    let cases = [
        ("if (column >= p.d_in) return;", ""),
        ("share == 0.0f || row == -1", "row == -1"),
        ("row == -1) return", "false) return"),
        ("row < 0 || row >= (int64_t)p.count", "false"),
        ("mask.data += b * p.mask_stride", "mask.data += 0 * p.mask_stride"),
        ("is_aligned && left >= 8", "is_aligned"),
        ("if (i >= left) continue;", ""),
        ("direction.v[i], h.v[i]", "h.v[i], direction.v[i]"),
        ("(double)strength, scale", "(double)strength, 1.0"),
        ("t += step", "t += 2 * step"),
    ];
    for (from, to) in cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = with_fault(folder.path(), "steer.cu", "_steer", &Fault { from, nth: 0, to });
        let panic = catch_unwind(|| {
            let mut random = Random(0x5eed);
            (0..3).for_each(|_| check_steering(&mut random, &program));
        });
        let found = panic.err().unwrap_or_else(|| panic!("steer.cu works with {to} for {from}"));
        let found = found.downcast_ref::<String>().expect("a message");
        println!("steer.cu with {to:?}: {found:.100}");
        // Memory that is nobody's, or a wrong number.
        let is_told = ["AddressSanitizer", "h["].iter().any(|message| found.contains(message));
        assert!(is_told, "steer.cu with {to:?}: {found}");
    }
}

#[test]
fn norms_of_tokens_are_sums_in_f64() {
    let mut random = Random::fresh();
    for (i, dtype) in REAL.into_iter().enumerate() {
        for [tokens, d_in] in [[1usize, 1], [19, 300], [9, 8]] {
            let aligned = d_in.next_multiple_of(8) - d_in;
            let place = Place { gap: random.pick(&[aligned, 1]), offset: random.pick(&[0, 1]) };
            let values = random.normals(tokens * d_in);
            let values: Vec<f32> = values.into_iter().map(|x| round(dtype, x)).collect();
            let mut arena = Arena::new();
            let hidden = arena.filled(dtype, d_in, &values, place);
            let out = [DType::F32, DType::F64][i % 2];
            let norms = arena.matrix(out, tokens, 1, Place { gap: 2, offset: 0 });
            let call =
                TokenNormsCall { tokens, d_in, hidden: hidden.matrix(), norms: norms.output() };
            let name = format!("T {tokens}, d {d_in}, {dtype:?}, {place:?}");
            let launch = token_norms(&call).expect("there are tokens");
            let memory = run_orders(&harness().join("simt"), &arena, &[launch], &name);
            check_untouched(&arena, &memory, &[norms], &name);
            for (t, row) in values.chunks(d_in).enumerate() {
                let exact = row.iter().map(|x| *x as f64 * *x as f64).sum::<f64>().sqrt();
                let found = norms.get(&memory, t, 0);
                let slack = if out == DType::F32 { 1e-7 } else { 1e-14 };
                assert!((found - exact).abs() <= slack * exact, "{found} {exact}: {name}");
            }
            assert!(token_norms(&TokenNormsCall { tokens: 0, ..call }).is_none());
        }
    }
}

/// Outputs that nobody asks for leave no trace, and change nothing in the others.
#[test]
fn absent_outputs_change_no_other() {
    let mut random = Random::fresh();
    for (dtype, count) in [(DType::BF16, 20), (DType::F32, 40)] {
        let p = Problem::random(&mut random, dtype, [80, 90, count]);
        let job = Job::new(&p);
        let whole = job.penalty(&p);
        let nothing = PenaltyCall {
            coef: None,
            loss_sum: None,
            token_count: None,
            latent_loss: None,
            grad: None,
            ..job.fused
        };
        let calls: [(PenaltyCall, Vec<Buffer>); 5] = [
            (PenaltyCall { loss_sum: job.fused.loss_sum, ..nothing }, vec![job.sums[0][0]]),
            (PenaltyCall { token_count: job.fused.token_count, ..nothing }, vec![job.sums[0][1]]),
            (PenaltyCall { latent_loss: job.fused.latent_loss, ..nothing }, vec![job.sums[0][2]]),
            (PenaltyCall { grad: job.fused.grad, ..nothing }, vec![job.grads[0]]),
            (PenaltyCall { coef: job.forward.coef, ..nothing }, vec![job.coef]),
        ];
        for (call, outputs) in calls {
            let memory = job.run(&job.arena, penalty(&job.rows, &call), &p.name);
            job.check_untouched(&memory, &outputs, &p);
            for output in outputs {
                let bits =
                    |memory| output.all(memory).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&memory), bits(&whole), "{}", p.name);
            }
        }
    }
}

#[test]
fn nan_stays_with_its_token() {
    let mut random = Random::fresh();
    for (dtype, count) in [(DType::F32, 5), (DType::F16, 40), (DType::BF16, 20)] {
        let mut p = Problem::random(&mut random, dtype, [40, 70, count]);
        p.mask = None;
        let job = Job::new(&p);
        let clean = (job.encode(&p), job.penalty(&p));
        // One element is enough.
        p.hidden[21 * p.d_in + 69] = f32::NAN;
        let job = Job::new(&p);
        let (z, memory) = (job.encode(&p), job.penalty(&p));
        for (n, (z, before)) in z.iter().zip(&clean.0).enumerate() {
            let own = n / count == 21;
            assert!(if own { z.is_nan() } else { z.to_bits() == before.to_bits() }, "{}", p.name);
        }
        for (n, x) in job.grads[0].all(&memory).iter().enumerate() {
            let before = job.grads[0].get(&clean.1, n / p.d_in, n % p.d_in);
            let own = n / p.d_in == 21;
            assert!(if own { x.is_nan() } else { x.to_bits() == before.to_bits() }, "{}", p.name);
        }
        for sums in &job.sums {
            assert!(sums[0].get(&memory, 0, 0).is_nan(), "{}", p.name);
            assert!(sums[2].all(&memory).iter().all(|loss| loss.is_nan()), "{}", p.name);
        }
    }
}

/// z from tensor cores that cut off is as good as a plain sum in f32, twice its error at most.
#[test]
fn latents_are_as_accurate_as_a_sum_in_f32() {
    let mut random = Random::fresh();
    for dtype in REAL {
        let shape = [16, 4096, 8];
        let mut p = Problem::of(&mut random, dtype, shape, GateKind::Open, TokenNorm::None);
        (p.scale, p.mask) = (None, None);
        p.bias.fill(0.0);
        let z = Job::new(&p).encode(&p);
        let (mut ours, mut plain) = (0.0, 0.0);
        for (n, z) in z.iter().enumerate() {
            let (hidden, row) = (p.hidden_row(n / 8), &p.weight[n % 8 * p.d_in..][..p.d_in]);
            let products = || row.iter().zip(&hidden);
            let exact: f64 = products().map(|(w, h)| *w as f64 * h).sum();
            let sum = products().fold(0.0f32, |sum, (w, h)| sum + *w * *h as f32);
            ours += (*z as f64 - exact).powi(2);
            plain += (sum as f64 - exact).powi(2);
        }
        let ratio = (ours / plain).sqrt();
        println!("{dtype:?}: {ratio:.2} times the error of a sum in f32");
        assert!(ratio < 2.0, "{dtype:?}: {ratio}");
    }
}

// --------------------------------------------------------------------------------------- faults

/// The nth `from` becomes `to`.
struct Fault<'a> {
    from: &'a str,
    nth: usize,
    to: &'a str,
}

/// Headers whose code belongs to the kernels that include them.
const SHARED: [&str; 2] = ["encode.cuh", "gradient.cuh"];

/// A harness with a fault in one source, or in a header of it, of which only the named kernel is
/// compiled.
fn with_fault(folder: &Path, source: &str, kernel: &str, fault: &Fault) -> PathBuf {
    let read =
        |file: &str| fs::read_to_string(root().join("kernels").join(file)).expect("a source");
    let text = read(source);
    let included = SHARED.iter().filter(|file| text.contains(&format!("#include \"{file}\"")));
    let (file, text_of_file) = std::iter::once(&source)
        .chain(included)
        .map(|file| (*file, read(file)))
        .find(|(_, text)| text.contains(fault.from))
        .unwrap_or_else(|| panic!("{source} has no {}", fault.from));
    let found = text_of_file.match_indices(fault.from).nth(fault.nth);
    let (at, _) = found.unwrap_or_else(|| panic!("{file} has fewer {}", fault.from));
    let changed_text =
        [&text_of_file[..at], fault.to, &text_of_file[at + fault.from.len()..]].concat();
    let text = if file == source { &changed_text } else { &text };
    if file != source {
        fs::write(folder.join(file), &changed_text).expect("a writable folder");
    }
    let other = |line: &&str| {
        ["FEW(", "TALL(", "WIDE(", "RESIDENT(", "SM90_KERNEL(", "KERNEL("]
            .iter()
            .any(|m| line.starts_with(m))
            && line.ends_with([')', '}'])
            && !line.contains(kernel)
    };
    let text: String =
        text.lines().filter(|line| !other(line)).map(|line| format!("{line}\n")).collect();
    let changed = folder.join(source);
    fs::write(&changed, text).expect("a writable folder");
    compile(&changed, &object(folder, source), &root().join("kernels"), FEWER_SANITIZERS);
    let folder_of = |file: &str| if file == source { folder } else { harness() };
    let files: Vec<PathBuf> = (KERNELS.iter().chain(&HARNESS).chain(&[TENSOR_CORE]))
        .map(|file| object(folder_of(file), file))
        .collect();
    let program = folder.join("simt");
    link(&files, &program);
    program
}

/// What `check` says to a fault, if anything.
fn verdict(p: &Problem, source: &str, kernel: &str, fault: Fault) -> Option<String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = with_fault(folder.path(), source, kernel, &fault);
    let panic = catch_unwind(|| check_job(p, &Job::on(&program, p))).err()?;
    let found = panic.downcast_ref::<String>().expect("a message").clone();
    assert!(!found.contains("a kernel that was not compiled"), "{source}: {found}");
    Some(found)
}

/// Several tiles of tokens, more slices than stages, every output. The last slice lies in the first
/// stage, which the epilogue uses again.
fn fault_problem(dtype: DType, count: usize, target: Target) -> Problem {
    fault_problem_of(dtype, [130, 830, count], target)
}

fn fault_problem_of(dtype: DType, shape: [usize; 3], target: Target) -> Problem {
    let mut random = Random(0x5eed);
    let (gate, norm) = (GateKind::Open, TokenNorm::None);
    let mut p = Problem::of(&mut random, dtype, shape, gate, norm);
    p.mask = Some((DType::U8, (0..p.tokens).map(|t| (t % 3) as f32).collect()));
    (p.grad_dtype, p.sums, p.accumulate) = (dtype, DType::F64, false);
    p.target = target;
    p.name = format!("T, d, K {shape:?}, {target:?}");
    p.reference.fill(0.0);
    p.places = [Place::default(); 7];
    // Rows of hidden states and dH that start at sixteen bytes.
    let gap = p.d_in.next_multiple_of(8) - p.d_in;
    (p.places[0].gap, p.places[5].gap) = (gap, gap);
    p
}

/// Several parts of rivals in several blocks of tokens, groups that begin and end within a part, a
/// list that is longer than a block's threads, tokens that are normalised.
fn topk_fault_problem(groups: usize) -> Problem {
    let mut random = Random(0x5eed);
    let (gate, norm) = (GateKind::TopK, TokenNorm::Layer);
    let mut p = Problem::of(&mut random, DType::F32, [12, 100, 30], gate, norm);
    let group: Vec<u32> = (0..p.count).map(|k| (k % groups) as u32).collect();
    p.dictionary = Dictionary {
        k: if groups == 1 { 150 } else { 9 },
        groups,
        group_size: 420 / groups,
        by_magnitude: groups == 1,
        rival: last_rivals(&group, 420 / groups),
        group,
        weight: random.rows(420, p.d_in, p.d_in, norm),
        bias: random.normals(420),
        glu_bias: None,
        gain: None,
    };
    (p.weight, p.bias) = p.dictionary.blocked();
    p.hidden.iter_mut().for_each(|h| *h += 1.0);
    p.at_once = [208, 8];
    p.mask = Some((DType::U8, (0..p.tokens).map(|t| (t % 5 > 0) as u8 as f32).collect()));
    (p.grad_dtype, p.sums, p.accumulate) = (DType::F32, DType::F64, false);
    p.name = format!("T 12, d 100, K 30, groups {groups}");
    p.reference.fill(0.0);
    p.places = [Place::default(); 7];
    p
}

/// Several tiles of tokens and of latents, two rows for each of these, masked tokens.
fn glu_fault_problem() -> Problem {
    let mut random = Random(0x5eed);
    let (gate, norm) = (GateKind::Open, TokenNorm::Constant);
    let mut p = Problem::of(&mut random, DType::F32, [70, 20, 40], gate, norm);
    p.mask = Some((DType::U8, (0..p.tokens).map(|t| (t % 3) as f32).collect()));
    (p.grad_dtype, p.sums, p.accumulate) = (DType::F32, DType::F64, false);
    p.name = "T 70, d 20, K 40, GLU".into();
    p.reference.fill(0.0);
    p.places = [Place::default(); 7];
    p.with_glu(&mut random)
}

/// Every nth call that `verdict` finds in a source, taken out.
fn check_without(source: &str, kernels: &[(&Problem, &str)], call: &str, without: &str) {
    let text = fs::read_to_string(root().join("kernels").join(source)).expect("a source");
    let calls = text.matches(call).count();
    assert!(calls > 0, "{source} has no {call}");
    for nth in 0..calls {
        let found = kernels.iter().find_map(|(p, kernel)| {
            verdict(p, source, kernel, Fault { from: call, nth, to: without })
        });
        let found = found.unwrap_or_else(|| panic!("{source} works without {call} {nth}"));
        println!("{source} without {call} {nth}: {found:.100}");
    }
}

#[test]
fn every_missing_barrier_and_wait_is_caught() {
    let [few, wide] = [3, 40].map(|count| fault_problem(DType::BF16, count, Target::Portable));
    let glu = glu_fault_problem();
    let (one, three) = (topk_fault_problem(1), topk_fault_problem(3));
    let cases: [(&str, &[(&Problem, &str)]); 5] = [
        ("topk.cu", &[(&one, "blockem_topk"), (&three, "blockem_topk")]),
        ("glu.cu", &[(&glu, "blockem_glu")]),
        ("encode.cu", &[(&few, "blockem_encode_bf16_8"), (&wide, "blockem_encode_bf16_wide")]),
        (
            "gradient.cu",
            &[(&few, "blockem_gradient_bf16_few"), (&wide, "blockem_gradient_bf16_wide")],
        ),
        ("reduce.cu", &[(&few, "blockem_reduce"), (&wide, "blockem_reduce")]),
    ];
    for (source, kernels) in cases {
        check_without(source, kernels, "sync_block();", "");
        if ["encode.cu", "gradient.cu"].contains(&source) {
            check_without(source, kernels, "copy_wait<", "if (false) copy_wait<");
        }
    }
}

/// The same for compute capability 9.0: tiles of tokens that follow each other, clusters, tokens of
/// which none counts.
#[test]
fn every_missing_barrier_and_wait_of_a_cluster_is_caught() {
    let few = fault_problem(DType::F32, 3, Target::Sm90 { clusters: [1, 0] });
    let idle = Problem { mask: Some((DType::U8, vec![0.0; few.tokens])), ..few.clone() };
    let wide = fault_problem(DType::BF16, 40, Target::Sm90 { clusters: [1, 1] });
    let resident: &[(&Problem, &str)] =
        &[(&few, "blockem_resident_f32_8"), (&idle, "blockem_resident_f32_8")];
    let encode: &[(&Problem, &str)] = &[(&wide, "blockem_encode_bf16_sm90")];
    // More rounds of 32 latents than stages.
    let many = fault_problem_of(DType::BF16, [130, 70, 260], Target::Sm90 { clusters: [1, 1] });
    let gradient: &[(&Problem, &str)] =
        &[(&wide, "blockem_gradient_bf16_sm90"), (&many, "blockem_gradient_bf16_sm90")];
    for (source, kernels, call, without) in [
        ("resident_sm90.cu", resident, "wait_for_the_one_before();", ""),
        ("resident_sm90.cu", resident, "sync_block();", ""),
        ("resident_sm90.cu", resident, "sync_cluster();", ""),
        ("resident_sm90.cu", resident, "sync_group(r.group);", ""),
        ("resident_sm90.cu", resident, "copy_wait_all_but(p", "if (false) copy_wait_all_but(p"),
        ("resident_sm90.cu", resident, "barrier_wait", "if (false) barrier_wait"),
        ("encode_sm90.cu", encode, "wait_for_the_one_before();", ""),
        ("encode_sm90.cu", encode, "sync_block();", ""),
        ("encode_sm90.cu", encode, "sync_cluster();", ""),
        ("encode_sm90.cu", encode, "wait_until_empty<", "if (false) wait_until_empty<"),
        ("encode_sm90.cu", encode, "sync_group(group);", ""),
        ("encode_sm90.cu", encode, "copy_wait<", "if (false) copy_wait<"),
        ("encode_sm90.cu", encode, "barrier_wait(", "if (false) barrier_wait("),
        ("gradient_sm90.cu", gradient, "wait_for_the_one_before();", ""),
        ("gradient_sm90.cu", gradient, "sync_cluster();", ""),
        ("gradient_sm90.cu", gradient, "wait_until_empty<", "if (false) wait_until_empty<"),
        ("gradient_sm90.cu", gradient, "barrier_wait(", "if (false) barrier_wait("),
    ] {
        check_without(source, kernels, call, without);
    }
}

#[test]
fn wrong_accesses_and_indices_are_caught() {
    let [few, wide] = [3, 40].map(|count| fault_problem(DType::BF16, count, Target::Portable));
    let sm90 = Target::Sm90 { clusters: [1, 1] };
    let [few_sm90, wide_sm90] = [3, 40].map(|count| fault_problem(DType::BF16, count, sm90));
    let (one, three) = (topk_fault_problem(1), topk_fault_problem(3));
    let glu = glu_fault_problem();
    let outside = "AddressSanitizer";
    let cases: &[(&Problem, &str, &str, &str, &str, &str)] = &[
        // Beyond shared memory: a copy, a plain store, a collective load.
        (
            &few,
            "encode.cu",
            "_bf16_8",
            "fill + 1 == S::STAGES ?",
            "fill == S::STAGES ?",
            "shared memory",
        ),
        (
            &few,
            "reduce.cu",
            "_reduce",
            "scratch[thread_index()] =",
            "scratch[thread_index() + 1] =",
            outside,
        ),
        (
            &few,
            "gradient.cu",
            "_bf16_few",
            "lane * ROW_BYTES",
            "(lane + 112) * ROW_BYTES",
            "shared memory",
        ),
        // Beyond a row of h, the tokens of coefficients, the columns of dH, the latents.
        (&few, "encode.cu", "_bf16_8", "left < 16 ? left : 16", "left ? 16 : 0", outside),
        (
            &wide,
            "gradient.cu",
            "_bf16_wide",
            "t >= p.tokens || k >= p.count",
            "k >= p.count",
            outside,
        ),
        (&few, "gradient.cu", "_bf16_few", "column + 8 <= p.d_in", "column < p.d_in", outside),
        (&wide, "encode.cu", "_bf16_wide", "if (k >= p.rows.count) continue;", "", outside),
        // A token that does not count.
        (&few, "encode.cu", "_bf16_8", "mask_of(p.mask, t) != 0.0f", "true", outside),
        // The wrong number from the right memory.
        (&few, "encode.cu", "_bf16_8", "dots.total[m][n][2 * half", "dots.total[m][n][half", "z "),
        (&few, "pack.cu", "_pack", "8 * q + 2 * j", "8 * j + 2 * q", "z "),
        (&wide, "gradient.cu", "_bf16_wide", "[2 * half + i % 2]", "[half + i % 2 * 2]", "dH["),
        (
            &wide,
            "gradient.cu",
            "_bf16_wide",
            "j / 2][j % 2 * 2 + half]",
            "j % 2][j / 2 * 2 + half]",
            "dH[",
        ),
        // The gate of TopK: the place of a key, ties, the list, groups, tokens.
        (&one, "topk.cu", "_topk", "bits >> 31 ? bits + 1 : bits - 1", "bits", "z "),
        (&three, "topk.cu", "_topk", "bits >> 31 ? ~bits", "bits >> 31 ? bits", "z "),
        (&one, "topk.cu", "_topk", "i < k; i += THREADS", "i < THREADS; i += THREADS", "z "),
        (&one, "topk.cu", "_topk", "n < newcomers ? larger[n] : kth", "kth", "z "),
        (&one, "topk.cu", "_topk", "taken += place.all;", "", "z "),
        (
            &three,
            "topk.cu",
            "_topk",
            "(p.first + start) / p.group_size",
            "start / p.group_size",
            "z ",
        ),
        (&three, "topk.cu", "_topk", "begins ? 0 : p.floors[t]", "p.floors[t]", "z "),
        (&one, "topk.cu", "_topk", "rival < count ?", "rival < THREADS ?", "z "),
        // A norm: its columns, its tokens, what it adds to dH.
        (&one, "norm.cu", "_norm", "/ mul_rn(d - 1.0, deviation)", "/ mul_rn(d, deviation)", "dH["),
        (&one, "norm.cu", "_norm", "if (column + i >= p.d_in) continue;", "", "z "),
        (&one, "norm.cu", "_norm", "if (t >= p.tokens) return;", "", outside),
        (&one, "norm.cu", "_norm", "has_coefficient(p, t)", "true", outside),
        (&one, "gradient.cu", "_f32_few", "add_rn(h.v[i], -mean)", "h.v[i]", "dH["),
        // A GLU encoder: its pairs, its tokens, its latents, tokens that do not count.
        (&glu, "glu.cu", "_glu", "dots[2 * k + 1], glu_bias", "dots[2 * k], glu_bias", "z "),
        (&glu, "glu.cu", "_glu", "to[1] = out.high", "to[1] = out.low", "dH["),
        (&glu, "glu.cu", "_glu", "if (t >= p.tokens) break;", "", outside),
        (&glu, "glu.cu", "_glu", "if (k < e.rows.count) loss", "loss", outside),
        (&glu, "glu.cu", "_glu", "if (mask != 0.0f) {", "{", outside),
        // A cluster: who adds up which part of which token, what goes where, what is expected.
        (&few_sm90, "resident_sm90.cu", "_bf16_8", "8 * half * LATENTS", "8 * half", "bits"),
        (&few_sm90, "resident_sm90.cu", "_bf16_8", "first / share)", "0)", "simt"),
        (&few_sm90, "resident_sm90.cu", "_bf16_8", "part < PARTS;", "part + 1 < PARTS;", "z "),
        (&few_sm90, "resident_sm90.cu", "_bf16_8", "clear(part);", "", "z "),
        (&few_sm90, "resident_sm90.cu", "_bf16_8", "loader.live = next_live;", "", outside),
        (&few_sm90, "resident_sm90.cu", "_bf16_8", "(last ? BEHIND : 0)", "0", "simt"),
        (&few_sm90, "resident_sm90.cu", "_bf16_8", "j * R::TERM_BYTES +", "", "dH["),
        (
            &wide_sm90,
            "encode_sm90.cu",
            "_bf16_sm90",
            "rows - first < share ? rows - first : share",
            "share",
            "simt",
        ),
        (&wide_sm90, "encode_sm90.cu", "_bf16_sm90", "+ 32 * step", "+ 16 * step", "z "),
        (&wide_sm90, "encode_sm90.cu", "_bf16_sm90", "blocks * WARPS", "WARPS", "simt"),
        (&wide_sm90, "gradient_sm90.cu", "_bf16_sm90", "Chunk{}", "Chunk{{~0u}}", "dH["),
        (&wide_sm90, "gradient_sm90.cu", "_bf16_sm90", "? SLICES : 1", "? SLICES : 2", outside),
    ];
    for (p, source, kernel, from, to, message) in cases.iter().copied() {
        let found = verdict(p, source, kernel, Fault { from, nth: 0, to });
        let found = found.unwrap_or_else(|| panic!("{source} works with {to} for {from}"));
        println!("{source} with {to}: {:.100}", found.replace('\n', " "));
        assert!(found.contains(message), "{source} with {to}: {found}");
    }
}

#[test]
fn wrong_statistics_are_caught() {
    let (gate, norm) = (GateKind::Open, TokenNorm::None);
    let mut p = Problem::of(&mut Random(0x5eed), DType::F32, [20, 30, 70], gate, norm);
    // Few tokens count: for some latents the 0 of those that do not would be the largest z.
    let shares = (0..p.tokens).map(|t| if t % 10 == 3 { 0.5 } else { 0.0 }).collect();
    p.mask = Some((DType::F32, shares));
    let cases = [
        ("if (k >= p.count) return;", "", "AddressSanitizer"),
        ("if (share[i] == 0.0f) continue;", "", "row 3"),
        ("mul_rn(share, z)", "z", "row 0"),
        ("if (!(z <= max || max != max)) max = z;", "max = z;", "row 3"),
        ("rise <= 0.0f ? 0.0f : rise", "rise", "row 9"),
        ("p.accumulate ? state[9 * p.state_stride] : 0.0", "0.0", "in two calls"),
        ("p.accumulate ? *p.token_count : 0.0", "0.0", "in two calls"),
    ];
    for (from, to, message) in cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let fault = Fault { from, nth: 0, to };
        let program = with_fault(folder.path(), "stats.cu", "_stats", &fault);
        let panic = catch_unwind(|| check_statistics(&mut Random(0x5eed), &p, &program)).err();
        let found = panic.unwrap_or_else(|| panic!("stats.cu works with {to} for {from}"));
        let found = found.downcast_ref::<String>().expect("a message");
        println!("stats.cu with {to:?}: {found:.100}");
        assert!(found.contains(message), "stats.cu with {to:?}: {found}");
    }
}
