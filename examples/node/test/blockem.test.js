// The frozen vectors of tests/vectors, which the tests of the other languages read too; the structs
// against the ABI's record; and what a failed call says.

import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { test } from 'node:test';

import koffi from 'koffi';

import { BlockemError, Latents, Plan, Sae, structs } from '../blockem.js';

const ROOT = new URL('../../../', import.meta.url);
const FOLDER = new URL('tests/vectors/', ROOT);
const NAMES = readdirSync(FOLDER).filter((name) => name.endsWith('.safetensors'));

test('structs have the recorded layout', () => {
  const record = readFileSync(new URL('tests/capi/abi.txt', ROOT), 'utf8').split('\n');
  for (const [name, type] of Object.entries(structs)) {
    const ours = [`struct ${name} ${koffi.sizeof(type)}`];
    for (const [field, { offset, type: of }] of Object.entries(type.members)) {
      ours.push(`  ${name}.${field} at ${offset}, ${koffi.sizeof(of)} bytes`);
    }
    const start = record.indexOf(ours[0]);
    assert.notEqual(start, -1, `${ours[0]} is not in abi.txt`);
    const theirs = record.slice(start, start + ours.length);
    assert.deepEqual(ours, theirs.map((line) => line.split(', ').slice(0, 2).join(', ')));
    const next = record[start + ours.length] ?? '';
    assert.ok(!next.startsWith(`  ${name}.`), `${name} lacks ${next.trim()}`);
  }
});

test('there are vectors', () => assert.ok(NAMES.length >= 10));

for (const name of NAMES) {
  test(name, () => {
    const vector = read(name);
    const { arrays, meta } = vector;
    const plan = makePlan(vector);
    const { dtype } = vector.tensors.hidden;
    const limit = (field) => Number(meta[`tolerance.f32.${field}`]);

    near('latents', plan.encode(arrays.hidden, dtype), arrays.latents, limit('latents'));
    const reference = plan.encode(arrays.base_hidden, dtype);
    near('reference', reference, arrays.reference, limit('latents'), 6e-8);

    const got = plan.penalty({ ...arrays, dtype, scale: Number(meta.scale) });
    near('loss_sum', [got.lossSum], arrays.loss_sum, limit('loss_sum'));
    near('latent_loss', got.latentLoss, arrays.latent_loss, limit('latent_loss'));
    near('grad_hidden', got.grad, arrays.grad_hidden, limit('grad_hidden'));
    assert.equal(got.tokenCount, arrays.token_count[0]);
    plan.close();
  });
}

test('errors have status and message', () => {
  fails(() => Sae.open('no-such-folder'), 200, 'IO', 'no-such-folder');
  const zeros = (n) => new Float32Array(n);
  const arrays = { dIn: 2, dSae: 3, encoderWeight: zeros(6), encoderBias: zeros(3) };
  const sae = Sae.fromTensors({ architecture: 'standard', ...arrays });
  fails(() => Latents.open('no-such-file.json', sae), 200, 'IO', 'no-such-file.json');
  const latents = Latents.create([3], [1]);
  fails(() => new Plan(sae, latents), 108, 'LATENT_RANGE', '3');
  assert.throws(() => Latents.create([1, 2], [1]), RangeError);
  assert.throws(() => new Plan(sae, latents, 'relu'), /there is no activation relu/);
  latents.close();
  sae.close();
});

function fails(work, status, statusName, part) {
  assert.throws(work, (error) => {
    assert.ok(error instanceof BlockemError, String(error));
    assert.deepEqual([error.status, error.statusName], [status, statusName]);
    assert.ok(error.message.includes(part), error.message);
    return true;
  });
}

// ---- Vectors -----------------------------------------------------------------------------------

/** A safetensors file: tests/vectors/generate.py says what its fields mean. */
function read(name) {
  const file = readFileSync(new URL(name, FOLDER));
  const size = Number(file.readBigUInt64LE(0));
  const { __metadata__: meta, ...header } = JSON.parse(file.toString('utf8', 8, 8 + size));
  const arrayTypes = {
    F64: Float64Array, F32: Float32Array, F16: Uint16Array, BF16: Uint16Array,
    I64: BigInt64Array, I8: Int8Array, U8: Uint8Array,
  };
  const arrays = {};
  const tensors = {};
  for (const [key, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    const bytes = Uint8Array.from(file.subarray(8 + size + from, 8 + size + to));
    arrays[key] = new arrayTypes[dtype](bytes.buffer);
    tensors[key] = { dtype: dtype.toLowerCase(), shape };
  }
  return { meta, arrays, tensors };
}

function makePlan({ meta, arrays, tensors }) {
  const [dSae, dIn] = tensors.encoder_weight.shape;
  const sae = Sae.fromTensors({
    architecture: meta.architecture,
    dIn,
    dSae,
    k: Number(meta.k),
    encoderWeight: arrays.encoder_weight,
    encoderBias: arrays.encoder_bias,
    threshold: arrays.threshold,
    gateBias: arrays.gate_bias,
    magnitudeBias: arrays.magnitude_bias,
    magnitudeLogScale: arrays.magnitude_log_scale,
    decoderBias: arrays.decoder_bias,
    decoderWeight: arrays.decoder_weight,
    inputScale: Number(meta.input_scale),
    subtractDecoderBias: meta.apply_b_dec_to_input === '1',
    rescaleByDecoderNorm: meta.rescale_acts_by_decoder_norm === '1',
  });
  const latents = Latents.create(arrays.ids, arrays.signs, arrays.weights);
  try {
    return new Plan(sae, latents, meta.activation);
  } finally {
    latents.close();
    sae.close();
  }
}

/** NaN where NaN is expected, elsewhere within limit + relative |expected|. */
function near(field, got, want, limit, relative = 0) {
  assert.equal(got.length, want.length, field);
  want.forEach((expected, i) => {
    const same = Math.abs(got[i] - expected) <= limit + relative * Math.abs(expected);
    const both = Number.isNaN(got[i]) && Number.isNaN(expected);
    assert.ok(same || both, `${field}[${i}] is ${got[i]}, expected ${expected} within ${limit}`);
  });
}
