// The BLOCK-EM penalty from Node: holds latents of an SAE where the base model had them.
//
//     node penalty.js SAE K0.json
//
// "Training" is gradient descent on the hidden states themselves: they start where a fine-tuned
// model has drifted to, and the printed penalty falls to nothing. A real trainer adds grad to the
// gradient that arrives at the layer's output.

import { BlockemError, Latents, Plan, Sae, version } from './blockem.js';

const TOKENS = 96;
const STEPS = 8;

/** Uniform in [-1, 1), the same on every machine. */
let state = 12345;
function noise() {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return (state >>> 8) / 8388608 - 1;
}

function makePlan(saePath, latentsPath) {
  const sae = Sae.open(saePath);
  try {
    const latents = Latents.open(latentsPath, sae);
    try {
      // Without the gate a latent that has fallen below its threshold still has a gradient.
      return new Plan(sae, latents, 'preactivation');
    } finally {
      latents.close();
    }
  } finally {
    sae.close();
  }
}

/** Gradient descent on hidden; whether the penalty fell. */
function descend(plan, hidden, reference) {
  let first = 0;
  let last = 0;
  for (let step = 0; step <= STEPS; step++) {
    const { lossSum, tokenCount, grad } = plan.penalty({ hidden, reference });
    const loss = (lossSum / tokenCount).toFixed(6);
    console.log(`step ${step}  loss ${loss}  (sum ${lossSum.toFixed(4)} over ${tokenCount} tokens)`);
    last = lossSum;
    if (step === 0) first = last;
    const squares = grad.reduce((sum, g) => sum + g * g, 0);
    if (squares === 0) break;
    // Polyak's step, loss / |gradient|^2, needs no learning rate.
    for (let i = 0; i < hidden.length; i++) hidden[i] -= (lossSum / squares) * grad[i];
  }
  return first > 0 && last < 0.1 * first;
}

function main([saePath, latentsPath, ...more]) {
  if (!latentsPath || more.length > 0) {
    console.error('usage: node penalty.js SAE K0.json');
    return 2;
  }
  console.log(`libblockem ${version()}`);
  const plan = makePlan(saePath, latentsPath);
  try {
    console.log(`plan: d ${plan.dIn}, K ${plan.numLatents}, ${plan.numerics}`);
    // The base model's hidden states give the reference, and fine-tuning has moved them.
    const hidden = Float32Array.from({ length: TOKENS * plan.dIn }, noise);
    const reference = plan.encode(hidden);
    for (let i = 0; i < hidden.length; i++) hidden[i] += 0.5 * noise();
    return descend(plan, hidden, reference) ? 0 : 1;
  } finally {
    plan.close();
  }
}

try {
  process.exitCode = main(process.argv.slice(2));
} catch (error) {
  if (!(error instanceof BlockemError)) throw error;
  console.error(`${error.message}\nstatus ${error.status}`);
  process.exitCode = 1;
}
