// libblockem for Node through its C ABI; blockem.h is the manual. The structs below are declared as
// the header has them, and test/blockem.test.js compares them with the ABI's record.
//
// Calls are synchronous: an error message belongs to the thread that made the call.

import koffi from 'koffi';

const library = koffi.load('libblockem.so.0.1');

const tensor = koffi.struct('blockem_tensor', {
  data: 'void *',
  dtype: 'int32_t',
  device_type: 'int32_t',
  device_index: 'int32_t',
  ndim: 'int32_t',
  shape: koffi.array('int64_t', 4),
  stride: koffi.array('int64_t', 4),
});

export const structs = {
  blockem_tensor: tensor,
  blockem_sae_desc: koffi.struct('blockem_sae_desc', {
    struct_size: 'size_t',
    encoder_weight: tensor,
    encoder_bias: tensor,
    decoder_bias: tensor,
    decoder_weight: tensor,
    threshold: tensor,
    gate_bias: tensor,
    magnitude_bias: tensor,
    magnitude_log_scale: tensor,
    d_in: 'int64_t',
    d_sae: 'int64_t',
    k: 'int64_t',
    activation_kind: 'int32_t',
    encoder_layout: 'int32_t',
    apply_b_dec_to_input: 'int32_t',
    rescale_acts_by_decoder_norm: 'int32_t',
    input_scale: 'double',
    hook_name: 'const char *',
    selection: 'int32_t',
    token_norm: 'int32_t',
    center_input: 'int32_t',
    reserved: 'int32_t',
  }),
  blockem_latents_desc: koffi.struct('blockem_latents_desc', {
    struct_size: 'size_t',
    ids: 'const int64_t *',
    signs: 'const int8_t *',
    weights: 'const float *',
    n: 'size_t',
  }),
  blockem_plan_options: koffi.struct('blockem_plan_options', {
    struct_size: 'size_t',
    device_type: 'int32_t',
    device_index: 'int32_t',
    backend: 'int32_t',
    activation: 'int32_t',
    num_threads: 'int32_t',
    reserved: 'int32_t',
    part: 'int32_t',
    reserved2: 'int32_t',
    column_begin: 'int64_t',
    column_end: 'int64_t',
  }),
  blockem_plan_info: koffi.struct('blockem_plan_info', {
    struct_size: 'size_t',
    d_in: 'int64_t',
    d_sae: 'int64_t',
    num_latents: 'int64_t',
    num_positive: 'int64_t',
    layer: 'int64_t',
    device_type: 'int32_t',
    device_index: 'int32_t',
    backend: 'int32_t',
    activation: 'int32_t',
    num_threads: 'int32_t',
    reserved: 'int32_t',
    identity: koffi.array('char', 72),
    numerics: koffi.array('char', 64),
    encode_needs_workspace: 'int32_t',
    backward_needs_hidden: 'int32_t',
  }),
  blockem_encode_args: koffi.struct('blockem_encode_args', {
    struct_size: 'size_t',
    hidden: tensor,
    latents: tensor,
    workspace: 'void *',
    workspace_size: 'size_t',
  }),
  blockem_penalty_args: koffi.struct('blockem_penalty_args', {
    struct_size: 'size_t',
    hidden: tensor,
    reference: tensor,
    mask: tensor,
    coef: tensor,
    loss_sum: tensor,
    token_count: tensor,
    latent_loss: tensor,
    grad_hidden: tensor,
    accumulate: 'int32_t',
    reserved: 'int32_t',
    scale: 'double',
    scale_tensor: tensor,
    workspace: 'void *',
    workspace_size: 'size_t',
  }),
};

const opaque = (name) => koffi.pointer(koffi.opaque(name));
const saePointer = opaque('blockem_sae');
const latentsPointer = opaque('blockem_latents');
const planPointer = opaque('blockem_plan');
const inPointer = (name) => koffi.pointer(structs[name]);
const outPointer = (type) => koffi.out(koffi.pointer(type));

const C = {
  statusName: library.func('const char *blockem_status_name(int32_t status)'),
  lastError: library.func('size_t blockem_last_error(_Out_ uint8_t *buf, size_t cap)'),
  version: library.func('const char *blockem_version_string()'),
  saeOpen: library.func('blockem_sae_open', 'int32_t', ['str', 'void *', outPointer(saePointer)]),
  saeFromTensors: library.func('blockem_sae_from_tensors', 'int32_t', [
    inPointer('blockem_sae_desc'),
    outPointer(saePointer),
  ]),
  saeFree: library.func('blockem_sae_free', 'void', [saePointer]),
  latentsOpen: library.func('blockem_latents_open', 'int32_t', [
    'str',
    saePointer,
    outPointer(latentsPointer),
  ]),
  latentsCreate: library.func('blockem_latents_create', 'int32_t', [
    inPointer('blockem_latents_desc'),
    outPointer(latentsPointer),
  ]),
  latentsFree: library.func('blockem_latents_free', 'void', [latentsPointer]),
  planCreate: library.func('blockem_plan_create', 'int32_t', [
    saePointer,
    latentsPointer,
    inPointer('blockem_plan_options'),
    outPointer(planPointer),
  ]),
  planInfoGet: library.func('blockem_plan_info_get', 'int32_t', [
    planPointer,
    koffi.inout(inPointer('blockem_plan_info')),
  ]),
  planWorkspaceSize: library.func('blockem_plan_workspace_size', 'int32_t', [
    planPointer,
    'int64_t',
    outPointer('size_t'),
  ]),
  planFree: library.func('blockem_plan_free', 'void', [planPointer]),
  encode: library.func('blockem_encode', 'int32_t', [
    planPointer,
    inPointer('blockem_encode_args'),
    'void *',
  ]),
  penalty: library.func('blockem_penalty', 'int32_t', [
    planPointer,
    inPointer('blockem_penalty_args'),
    'void *',
  ]),
};

const DTYPES = { f32: 0, f16: 1, bf16: 2, f64: 3, u8: 4 };
const ACTIVATION_KINDS = { standard: 0, jumprelu: 1, gated: 2, topk: 3 };
const ACTIVATIONS = { native: 0, dense_relu: 1, preactivation: 2 };
const ENCODER_LAYOUT_F_D = 2;

/** Of the library that runs, such as "0.1.0". */
export const version = () => C.version();

/** A failed call: the number and the name of its status, and the library's message. */
export class BlockemError extends Error {
  constructor(status) {
    const text = Buffer.alloc(Number(C.lastError(null, 0)) + 1);
    C.lastError(text, text.length);
    const name = C.statusName(status);
    super(`${name}: ${text.toString('utf8', 0, text.length - 1)}`);
    Object.assign(this, { status, statusName: name });
  }
}

/** An opened sparse autoencoder. */
export class Sae {
  /** The file or the folder that its owner publishes. */
  static open(path) {
    return new Sae(made((out) => C.saeOpen(path, null, out)));
  }

  /** Float32Arrays, row-major, which the library copies; encoderWeight and decoderWeight are [F, d]. */
  static fromTensors({ architecture, dIn, dSae, ...rest }) {
    const rows = (name) => view(rest[name], [dSae]);
    return new Sae(
      made((out) =>
        C.saeFromTensors(
          sized('blockem_sae_desc', {
            encoder_weight: view(rest.encoderWeight, [dSae, dIn]),
            encoder_bias: rows('encoderBias'),
            decoder_bias: view(rest.decoderBias, [dIn]),
            decoder_weight: view(rest.decoderWeight, [dSae, dIn]),
            threshold: rows('threshold'),
            gate_bias: rows('gateBias'),
            magnitude_bias: rows('magnitudeBias'),
            magnitude_log_scale: rows('magnitudeLogScale'),
            d_in: dIn,
            d_sae: dSae,
            k: rest.k ?? 0,
            activation_kind: known('architecture', ACTIVATION_KINDS, architecture),
            encoder_layout: ENCODER_LAYOUT_F_D,
            apply_b_dec_to_input: Number(rest.subtractDecoderBias ?? false),
            rescale_acts_by_decoder_norm: Number(rest.rescaleByDecoderNorm ?? false),
            input_scale: rest.inputScale ?? 0,
            hook_name: null,
            selection: 0,
            token_norm: 0,
            center_input: 0,
            reserved: 0,
          }),
          out,
        ),
      ),
    );
  }

  constructor(handle) {
    this.handle = handle;
  }

  /** Plans made from it live on. */
  close() {
    C.saeFree(this.handle);
    this.handle = null;
  }
}

/** A set of blocked latents. */
export class Latents {
  /** The authors' K0.json. */
  static open(path, sae) {
    return new Latents(made((out) => C.latentsOpen(path, sae.handle, out)));
  }

  /** Signs +1 block a rise (K+), -1 a fall (K-); without weights each is 1. */
  static create(ids, signs, weights = null) {
    if (signs.length !== ids.length || (weights && weights.length !== ids.length)) {
      throw new RangeError('ids, signs and weights must have one length');
    }
    const desc = sized('blockem_latents_desc', {
      ids: BigInt64Array.from(ids, BigInt),
      signs: Int8Array.from(signs),
      weights: weights && Float32Array.from(weights),
      n: ids.length,
    });
    return new Latents(made((out) => C.latentsCreate(desc, out)));
  }

  constructor(handle) {
    this.handle = handle;
  }

  /** Plans made from it live on. */
  close() {
    C.latentsFree(this.handle);
    this.handle = null;
  }
}

/** The blocked rows of an SAE. The SAE and the latent set may be closed. */
export class Plan {
  constructor(sae, latents, activation = 'native') {
    const options = sized('blockem_plan_options', {
      device_type: 0,
      device_index: 0,
      backend: 0,
      activation: known('activation', ACTIVATIONS, activation),
      num_threads: 0,
      reserved: 0,
      part: 0,
      reserved2: 0,
      column_begin: 0,
      column_end: 0,
    });
    this.handle = made((out) => C.planCreate(sae.handle, latents.handle, options, out));
    const info = { struct_size: koffi.sizeof(structs.blockem_plan_info) };
    check(C.planInfoGet(this.handle, info));
    this.dIn = info.d_in;
    this.numLatents = info.num_latents;
    this.numerics = info.numerics;
  }

  /** z [T, K] of hidden [T, d], row-major: references for later calls. */
  encode(hidden, dtype = 'f32') {
    const tokens = this.#tokens(hidden);
    const latents = new Float32Array(tokens * this.numLatents);
    const args = sized('blockem_encode_args', {
      hidden: view(hidden, [tokens, this.dIn], dtype),
      latents: view(latents, [tokens, this.numLatents]),
      ...this.#workspace(tokens),
    });
    check(C.encode(this.handle, args, null));
    return latents;
  }

  /**
   * The penalty and its gradient in one pass over hidden [T, d]: a Float32Array, or a Uint16Array
   * with the bits of dtype f16 or bf16. reference [T, K] is encode of the base model's hidden states;
   * mask [T] is a Uint8Array, a Float32Array of shares, or nothing. Add lossSum and tokenCount up
   * over micro-batches, then divide once. grad [T, d] is scale times the gradient of lossSum.
   */
  penalty({ hidden, dtype = 'f32', reference, mask = null, scale = 1 }) {
    const tokens = this.#tokens(hidden);
    const lossSum = new Float64Array(1);
    const tokenCount = new Float64Array(1);
    const latentLoss = new Float64Array(this.numLatents);
    const grad = new Float32Array(hidden.length);
    const args = sized('blockem_penalty_args', {
      hidden: view(hidden, [tokens, this.dIn], dtype),
      reference: view(reference, [tokens, this.numLatents]),
      mask: view(mask, [tokens]),
      coef: view(null),
      loss_sum: view(lossSum, [1]),
      token_count: view(tokenCount, [1]),
      latent_loss: view(latentLoss, [this.numLatents]),
      grad_hidden: view(grad, [tokens, this.dIn]),
      accumulate: 0,
      reserved: 0,
      scale,
      scale_tensor: view(null),
      ...this.#workspace(tokens),
    });
    check(C.penalty(this.handle, args, null));
    return { lossSum: lossSum[0], tokenCount: tokenCount[0], latentLoss, grad };
  }

  close() {
    C.planFree(this.handle);
    this.handle = null;
  }

  #tokens(hidden) {
    if (hidden.length % this.dIn !== 0) {
      throw new RangeError(`${hidden.length} elements of hidden are no whole rows of ${this.dIn}`);
    }
    return hidden.length / this.dIn;
  }

  /** Scratch memory that starts at a multiple of 64 bytes. */
  #workspace(tokens) {
    const bytes = [0];
    check(C.planWorkspaceSize(this.handle, tokens, bytes));
    const block = new Uint8Array(Number(bytes[0]) + 63);
    const past = Number(koffi.address(block) % 64n);
    const workspace = block.subarray((64 - past) % 64);
    return { workspace, workspace_size: bytes[0] };
  }
}

function check(status) {
  if (status !== 0) throw new BlockemError(status);
}

/** The handle that a call writes. */
function made(call) {
  const out = [null];
  check(call(out));
  return out[0];
}

function sized(name, fields) {
  return { struct_size: koffi.sizeof(structs[name]), ...fields };
}

/** A row-major view of a typed array, which the caller keeps; null is absent. */
function view(data, shape = [], dtype = dtypeOf(data)) {
  const four = (values) => [...values, 0, 0, 0, 0].slice(0, 4);
  const elements = shape.reduce((product, n) => product * n, 1);
  if (data && data.length !== elements) {
    throw new RangeError(`${data.length} elements do not fill [${shape}]`);
  }
  return {
    data: data ?? null,
    dtype: known('dtype', DTYPES, dtype),
    device_type: 0,
    device_index: 0,
    ndim: shape.length,
    shape: four(shape),
    stride: four(shape.map((_, i) => shape.slice(i + 1).reduce((product, n) => product * n, 1))),
  };
}

function dtypeOf(data) {
  if (data instanceof Float64Array) return 'f64';
  return data instanceof Uint8Array ? 'u8' : 'f32';
}

function known(what, table, name) {
  if (!Object.hasOwn(table, name)) {
    throw new RangeError(`there is no ${what} ${name}: ${Object.keys(table).join(', ')}`);
  }
  return table[name];
}
