//! From calls to launches, without a device.

use super::*;
use crate::backend::Column;

const ROWS: DeviceRows = DeviceRows {
    target: Target::Portable,
    d_in: 4096,
    count: 20,
    norm: TokenNorm::None,
    gate: GateKind::Relu,
    packed: 0x1000,
    bias: 0x2000,
    scale: 0,
    glu_bias: 0,
    gate_values: 0,
    sign_weight: 0x3000,
    topk: None,
};

const H200: Target = Target::Sm90 { clusters: [32, 16] };

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
            size: workspace_size(&DeviceRows { count, ..ROWS }, tokens),
        },
    }
}

fn kernels(launches: impl Iterator<Item = Launch>) -> Vec<(Kernel, u32)> {
    launches.map(|l| (l.kernel, l.grid[0])).collect()
}

#[test]
fn kernels_are_numbered_in_order_and_fit_every_device() {
    for (n, kernel) in Kernel::ALL.iter().enumerate() {
        assert_eq!(*kernel as usize, n);
        let most = if kernel.is_of(Target::Portable) { 99 << 10 } else { 227 << 10 };
        assert!(kernel.shared_limit() <= most, "{kernel:?}");
        assert!(kernel.is_of(Target::Portable) || kernel.is_of(H200), "{kernel:?}");
    }
}

#[test]
fn few_latents_take_one_pass_and_many_take_tiles() {
    use Kernel::*;
    let few = penalty_call(8192, 20);
    // 128 tiles of tokens; 128 × 32 tiles of dH, four to a CTA.
    let expected = [(EncodeBf16K24, 128), (GradientBf16Few, 1024), (ReduceLatents, 1)];
    assert_eq!(kernels(penalty(&ROWS, &few)), expected);
    let rows = DeviceRows { count: 1000, ..ROWS };
    let many = penalty_call(300, 1000);
    let expected = [
        (EncodeBf16Wide, 3 * 16),
        (GradientBf16Wide, 3 * 32),
        (ReduceLatents, 32),
        (ReduceTotal, 1),
    ];
    assert_eq!(kernels(penalty(&rows, &many)), expected);
    for launch in penalty(&ROWS, &few).chain(penalty(&rows, &many)) {
        assert!(launch.shared <= launch.kernel.shared_limit());
    }
}

const TOPK: DeviceTopK = DeviceTopK {
    k: 64,
    groups: 1,
    group_size: 5000,
    by_magnitude: false,
    group: 0x6000,
    packed: 0x100_0000,
    gain: 0,
    bias: 0x7000,
    glu_bias: 0,
    at_once: RIVALS_AT_ONCE,
    tokens_at_once: TOKENS_AT_ONCE,
};

#[test]
fn rivals_are_compared_part_by_part_and_block_by_block() {
    use Kernel::*;
    let rows = DeviceRows { gate: GateKind::TopK, topk: Some(TOPK), ..ROWS };
    let mut call = penalty_call(5000, 20);
    call.workspace.size = workspace_size(&rows, 5000);
    call.mask =
        Some(Mask { data: std::ptr::without_provenance(0x60_0000), dtype: DType::U8, stride: 3 });
    let part = |tokens: u32, rivals: u32| {
        [(EncodeBf16Wide, tokens.div_ceil(128) * rivals.div_ceil(64)), (TopK, tokens)]
    };
    let block = |tokens| [part(tokens, 2048), part(tokens, 2048), part(tokens, 904)].concat();
    let rest = [(EncodeBf16K24, 79), (GradientBf16Few, 79 * 32 / 2), (ReduceLatents, 1)];
    let expected = [block(4096), block(904), rest.to_vec()].concat();
    assert_eq!(kernels(penalty(&rows, &call)).len(), expected.len());
    assert_eq!(kernels(penalty(&rows, &call))[..12], expected[..12]);
    let [.., last] = penalty(&rows, &call).filter(|l| l.kernel == TopK).collect::<Vec<_>>()[..]
    else {
        panic!("there is one")
    };
    let Params::TopK(p) = last.params else { panic!("its own parameters") };
    assert_eq!((p.first, p.count, p.mask.data), (4096, 904, 0x60_0000 + 3 * 4096));
    let encode = penalty(&rows, &call).nth(6).expect("the second block's first part");
    let Params::Encode(p) = encode.params else { panic!("its own parameters") };
    assert_eq!(p.hidden.data, 0x10_0000 + 4096 * 4096 * 2);
    assert_eq!(p.rows.packed, 0x100_0000);
    let bytes = 2 * packed_bytes(2048, 4096) + packed_bytes(904, 4096);
    assert_eq!(TOPK.packed_bytes(1, 4096), bytes);
}

#[test]
fn a_norm_comes_first_and_its_gradient_pulls() {
    use Kernel::*;
    let rows = DeviceRows { norm: TokenNorm::Layer, ..ROWS };
    let mut call = penalty_call(100, 20);
    call.workspace.size = workspace_size(&rows, 100);
    let names = |launches: Vec<(Kernel, u32)>| -> Vec<Kernel> {
        launches.into_iter().map(|(kernel, _)| kernel).collect()
    };
    let fused = names(kernels(penalty(&rows, &call)));
    assert_eq!(fused, [Norm, EncodeBf16K24, Pull, GradientBf16Few, ReduceLatents]);
    let forward = PenaltyCall { grad: None, ..call };
    let forward = names(kernels(penalty(&rows, &forward)));
    assert_eq!(forward, [Norm, EncodeBf16K24, ReduceLatents]);
    let back = BackwardCall {
        tokens: 100,
        coef: matrix(0x20_0000, DType::F32, 20),
        grad: call.grad.expect("there is one"),
        hidden: Some(call.hidden),
        workspace: call.workspace,
    };
    let back = names(kernels(backward(&rows, &back)));
    assert_eq!(back, [Norm, EncodeBf16K24, Pull, GradientBf16Few]);
}

#[test]
fn statistics_take_blocks_of_tokens_and_parts_of_the_dictionary() {
    use Kernel::*;
    let mut dictionary = DeviceDictionary::new(4096, 20_000, TokenNorm::None, GateKind::Relu);
    (dictionary.rows.packed, dictionary.rows.bias) = (0x1000, 0x2000);
    let call = |tokens: usize, accumulate| StatsCall {
        tokens,
        hidden: matrix(0x10_0000, DType::BF16, 4096),
        base_hidden: Some(matrix(0x20_0000, DType::BF16, 4096)),
        mask: None,
        state: matrix(0x30_0000, DType::F64, 20_003),
        token_count: Some(std::ptr::without_provenance_mut(0x40_0000)),
        accumulate,
        workspace: Workspace {
            data: std::ptr::without_provenance_mut(0x50_0000),
            size: stats_workspace_size(&dictionary, tokens, true),
        },
    };
    let part = |tokens: u32, latents: u32| {
        let encode = (EncodeBf16Wide, tokens.div_ceil(128) * latents.div_ceil(64));
        [encode, encode, (Stats, latents.div_ceil(64))]
    };
    let block = |tokens| [part(tokens, 8192), part(tokens, 8192), part(tokens, 3616)].concat();
    let launches: Vec<Launch> = statistics(&dictionary, &call(1500, false)).collect();
    let found: Vec<(Kernel, u32)> = launches.iter().map(|l| (l.kernel, l.grid[0])).collect();
    assert_eq!(found, [block(1024), block(476)].concat());
    let sums = launches.iter().filter_map(|launch| match launch.params {
        Params::Stats(p) => Some((p.state, p.token_count, p.accumulate, p.tokens, p.count)),
        _ => None,
    });
    let at = |latent: u64| 0x30_0000 + 8 * latent;
    let expected = [
        (at(0), 0x40_0000, 0, 1024, 8192),
        (at(8192), 0, 0, 1024, 8192),
        (at(16384), 0, 0, 1024, 3616),
        (at(0), 0x40_0000, 1, 476, 8192),
        (at(8192), 0, 1, 476, 8192),
        (at(16384), 0, 1, 476, 3616),
    ];
    assert_eq!(sums.collect::<Vec<_>>(), expected);
    // A tile of z of either model, and no more.
    let bytes = |tokens| stats_workspace_size(&dictionary, tokens, true);
    assert!(bytes(100_000) == bytes(1024) && bytes(1024) < (2 << 25) + 4096);
    // Without a token there is still a state to begin.
    let begun: Vec<_> = kernels(statistics(&dictionary, &call(0, false)));
    assert_eq!(begun, [(Stats, 128), (Stats, 128), (Stats, 57)]);
    assert_eq!(statistics(&dictionary, &call(0, true)).count(), 0);
}

#[test]
fn steering_fills_a_device_and_no_more() {
    let directions = DeviceDirections { d_in: 4096, count: 5, rows: 0x1000 };
    let call = |batch: usize, positions: usize, hidden_stride| SteerCall {
        batch,
        positions,
        hidden: matrix(0x10_0000, DType::BF16, 4096),
        hidden_stride,
        row: Column { data: std::ptr::null(), stride: 1 },
        strength: Column { data: std::ptr::null(), stride: 1 },
        mask: None,
        mask_stride: 0,
        scale: 1.0,
        scale_tensor: None,
    };
    // A token that is generated, and a prompt of more positions than are taken at a time.
    let cases = [(call(64, 1, 4096), 256, 1), (call(64, 512, 512 * 4096 + 1), STEER_CTAS, 0)];
    for (call, blocks, aligned) in cases {
        let launch = steer(&directions, &call).expect("there are positions");
        assert_eq!(launch.grid, [blocks as u32, 1, 1]);
        let Params::Steer(p) = launch.params else { panic!("its own parameters") };
        assert_eq!((p.column_tiles, p.hidden.is_aligned), (4, aligned));
    }
    assert!(steer(&directions, &call(0, 5, 4096)).is_none());
}

#[test]
fn a_glu_spreads_its_coefficients_before_anything_else_uses_them() {
    use Kernel::*;
    let names = |launches: Vec<(Kernel, u32)>| -> Vec<Kernel> {
        launches.into_iter().map(|(kernel, _)| kernel).collect()
    };
    for (norm, count) in [(TokenNorm::None, 20), (TokenNorm::Constant, 12)] {
        let rows = DeviceRows { norm, count, glu_bias: 0x8000, ..ROWS };
        let mut call = penalty_call(100, count);
        call.workspace.size = workspace_size(&rows, 100);
        let back = BackwardCall {
            tokens: 100,
            coef: matrix(0x20_0000, DType::F32, count),
            grad: call.grad.expect("there is one"),
            hidden: Some(call.hidden),
            workspace: call.workspace,
        };
        let fused = names(kernels(penalty(&rows, &call)));
        let forward = names(kernels(penalty(&rows, &PenaltyCall { grad: None, ..call })));
        let back = names(kernels(backward(&rows, &back)));
        if norm == TokenNorm::None {
            // Two rows for each latent.
            let gradient = [GluCoefficients, GradientBf16Wide];
            let encode = [EncodeBf16Wide, GluLatents];
            assert_eq!(fused, [&encode[..], &gradient, &[ReduceLatents]].concat());
            assert_eq!(forward, [&encode[..], &[ReduceLatents]].concat());
            assert_eq!(back, [&[Norm, EncodeBf16Wide][..], &gradient].concat());
        } else {
            let gradient = [GluCoefficients, Pull, GradientBf16Few];
            let encode = [Norm, EncodeBf16K24, GluLatents];
            assert_eq!(fused, [&encode[..], &gradient, &[ReduceLatents]].concat());
            assert_eq!(forward, [&encode[..], &[ReduceLatents]].concat());
            assert_eq!(back, [&encode[..2], &gradient].concat());
        }
    }
}

#[test]
fn without_tokens_only_the_sums_are_written() {
    for norm in [TokenNorm::None, TokenNorm::Constant] {
        let topk = Some(TOPK);
        let rows = DeviceRows { norm, gate: GateKind::TopK, topk, ..ROWS };
        let workspace = penalty_call(0, 20).workspace;
        let call = penalty_call(0, 20);
        assert_eq!(kernels(penalty(&rows, &call)), [(Kernel::ReduceLatents, 1)]);
        let hidden = matrix(0x10_0000, DType::F32, 4096);
        let call = EncodeCall { tokens: 0, hidden, latents: hidden, workspace };
        assert_eq!(encode(&rows, &call).count(), 0);
        let grad = penalty_call(0, 20).grad.expect("there is one");
        let call = BackwardCall { tokens: 0, coef: hidden, grad, hidden: Some(hidden), workspace };
        assert_eq!(backward(&rows, &call).count(), 0);
    }
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
    let gates = [None, Some(DeviceTopK { groups: 3, tokens_at_once: 128, ..TOPK })];
    for (count, tokens) in [(1, 0), (1, 1), (20, 65), (4096, 200)] {
        let norms = [TokenNorm::None, TokenNorm::Layer];
        let kinds = norms.into_iter().zip(gates).flat_map(|(norm, topk)| {
            [0, 0x8000].map(move |glu_bias| DeviceRows { count, norm, topk, glu_bias, ..ROWS })
        });
        for rows in kinds {
            let DeviceRows { norm, topk, .. } = rows;
            let (s, end) = sections(64, &rows, tokens);
            let tiles = tokens.div_ceil(64);
            let normed = if norm == TokenNorm::None { 0 } else { tokens };
            let glu = if rows.is_glu() { tokens } else { 0 };
            let dotted = normed.max(glu);
            let (groups, k, part, block) =
                topk.map_or((0, 0, 0, 0), |g| (g.groups, g.k, g.at_once, tokens.min(128)));
            let matrix = |m: &Matrix| address(m.data);
            let ends = [
                (s.token_scales, 4 * normed, s.token_means),
                (s.token_means, 4 * normed, s.token_slopes),
                (s.token_slopes, 8 * normed, s.token_pulls),
                (s.token_pulls, 8 * normed, s.live),
                (s.live, 4 * dotted, matrix(&s.dots)),
                (matrix(&s.dots), 4 * dotted * s.dots.row_stride, matrix(&s.row_coef)),
                (matrix(&s.row_coef), 4 * glu * s.row_coef.row_stride, s.thresholds),
                (s.thresholds, 4 * tokens * groups, s.pre),
                (s.pre, 4 * block * part, matrix(&s.rival_dots)),
                (matrix(&s.rival_dots), 8 * block.min(glu) * part, s.largest),
                (s.largest, 4 * block * k, s.floors),
                (s.floors, 4 * block, matrix(&s.coef)),
                (matrix(&s.coef), 4 * tokens * s.coef.row_stride, s.loss_partials),
                (s.loss_partials, 8 * tiles * padded_count(count), s.count_partials),
                (s.count_partials, 8 * tiles, s.latent_sums),
                (s.latent_sums, 8 * count, 64 + end as u64),
            ];
            for (start, bytes, next) in ends {
                assert_eq!(start % 64, 0);
                assert!(start + bytes as u64 <= next, "K {count}, T {tokens}, {norm:?}");
            }
        }
    }
}

/// Rows that stay in shared memory take a call at once; what does not fit goes to the wide kernels.
#[test]
fn compute_capability_9_has_kernels_of_its_own() {
    use Kernel::*;
    let rows = |count, d_in| DeviceRows { target: H200, count, d_in, ..ROWS };
    let call = |tokens, count, dtype: DType, grad_dtype: DType| {
        let mut call = penalty_call(tokens, count);
        call.hidden.dtype = dtype;
        call.grad =
            call.grad.map(|grad| Grad { rows: Matrix { dtype: grad_dtype, ..grad.rows }, ..grad });
        call
    };
    let shapes = |launches: Vec<Launch>| -> Vec<(Kernel, u32, u32)> {
        launches.into_iter().map(|l| (l.kernel, l.grid[0], l.cluster)).collect()
    };
    let (bf16, f16, f32) = (DType::BF16, DType::F16, DType::F32);
    let sums = (ReduceLatents, 1, 1);
    let cases = [
        // Sixteen clusters of eight take four tiles of 128 tokens each.
        (8192, 4096, 20, bf16, bf16, vec![(ResidentBf16K24, 128, 8), sums]),
        (2048, 4096, 20, bf16, bf16, vec![(ResidentBf16K24, 128, 8), sums]),
        (32768, 8192, 20, bf16, bf16, vec![(ResidentBf16K24, 128, 8), sums]),
        (8192, 4096, 8, f16, f16, vec![(ResidentF16K8, 128, 4), sums]),
        (8192, 2304, 20, f32, f32, vec![(ResidentF32K24, 128, 4), sums]),
        (100, 64, 1, f32, f32, vec![(ResidentF32K8, 8, 8), sums]),
        // dH of another dtype comes from a launch of its own.
        (
            8192,
            4096,
            20,
            bf16,
            f32,
            vec![(ResidentBf16K24, 128, 8), (ResidentF32K24, 128, 8), sums],
        ),
        // Too many columns for so many rows; too many rows.
        (
            8192,
            8192,
            32,
            bf16,
            bf16,
            vec![(EncodeBf16Sm90, 64, 4), (GradientBf16Sm90, 64 * 64, 4), sums],
        ),
        (
            8192,
            4096,
            128,
            bf16,
            bf16,
            vec![
                (EncodeBf16Sm90, 128, 4),
                (GradientBf16Sm90, 64 * 32, 4),
                (ReduceLatents, 4, 1),
                (ReduceTotal, 1, 1),
            ],
        ),
        // Three tiles of tokens: a cluster of four would leave a quarter of its blocks without any.
        (
            300,
            4096,
            100,
            f32,
            f32,
            vec![
                (EncodeF32Sm90, 3 * 2, 1),
                (GradientF32Sm90, 3 * 32, 1),
                (ReduceLatents, 4, 1),
                (ReduceTotal, 1, 1),
            ],
        ),
    ];
    for (tokens, d_in, count, dtype, grad_dtype, expected) in cases {
        let launches: Vec<Launch> =
            penalty(&rows(count, d_in), &call(tokens, count, dtype, grad_dtype)).collect();
        for launch in &launches {
            assert!(launch.shared <= launch.kernel.shared_limit() && launch.kernel.is_of(H200));
            assert_eq!(launch.grid[0] % launch.cluster, 0);
        }
        assert_eq!(shapes(launches), expected, "T {tokens}, d {d_in}, K {count}, {dtype:?}");
    }
    // No cluster runs there at all: part of a device, for example.
    let alone = DeviceRows { target: Target::Sm90 { clusters: [0, 0] }, ..rows(20, 4096) };
    let launches = penalty(&alone, &call(64, 20, bf16, bf16)).collect();
    assert_eq!(shapes(launches), [(EncodeBf16Sm90, 1, 1), (GradientBf16Sm90, 32, 1), sums]);
}

/// What tests/compile_kernels.sh makes a report of: each launch of a fused call on an H200, with the
/// bytes that it must move, the packed rows that its blocks read through the cache, and the products
/// of bf16 numbers that it makes.
#[test]
fn footprints() {
    let (tokens, d_in) = (8192, 4096);
    for dtype in [DType::BF16, DType::F32] {
        for count in [20, 128, 1024, 4096] {
            let rows = DeviceRows { target: H200, count, d_in, ..ROWS };
            let mut call = penalty_call(tokens, count);
            call.hidden.dtype = dtype;
            if let Some(grad) = &mut call.grad {
                grad.rows.dtype = dtype;
                grad.accumulate = false;
            }
            let (matrix, values) = (tokens * d_in * dtype.size(), tokens * count * 4);
            let (encode_terms, grad_terms) = if dtype == DType::F32 { (6, 6) } else { (3, 3) };
            for launch in penalty(&rows, &call) {
                let clusters = (launch.grid[0] / launch.cluster) as usize;
                let (must, packed, terms, of) = match launch.params {
                    Params::Encode(_) => {
                        let across = count.div_ceil(64);
                        let rows = clusters / across * packed_bytes(count, d_in);
                        (matrix + 2 * values, rows, encode_terms, across * 64)
                    }
                    Params::Gradient(p) => {
                        let across = p.column_tiles as usize;
                        let own = if dtype == DType::F32 { 3 } else { 2 };
                        let rows = clusters / across * packed_bytes(count, d_in) / TERMS * own;
                        (matrix + values, rows, grad_terms, count.next_multiple_of(32))
                    }
                    Params::Resident(_) => {
                        let rows = clusters * packed_bytes(count, d_in);
                        let terms = encode_terms + grad_terms;
                        (2 * matrix + values, rows, terms, padded_count(count))
                    }
                    Params::Reduce(p) => ((p.tiles * 8) as usize * padded_count(count), 0, 0, 0),
                    _ => unreachable!("a call of few kinds"),
                };
                println!(
                    "launch {} {count} {} {} {} {} {} {must} {packed} {}",
                    dtype.name(),
                    launch.kernel.name().to_string_lossy(),
                    launch.grid[0],
                    launch.cluster,
                    launch.block,
                    launch.shared,
                    2 * terms * tokens * d_in * of
                );
            }
        }
    }
}
