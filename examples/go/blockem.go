// Package blockem computes the BLOCK-EM penalty through libblockem's C ABI; blockem.h is the manual.
//
// Two things that a binding in Go has to do: an error message belongs to the thread of the system
// that made the call, so call holds the goroutine on it; and C gets pointers to Go's memory inside
// of structs, so every slice is pinned for the length of the call.
package blockem

// #cgo pkg-config: blockem
// #include <stdlib.h>
// #include <blockem.h>
//
// static blockem_tensor new_tensor(void) {
//   blockem_tensor tensor = BLOCKEM_TENSOR_INIT;
//   return tensor;
// }
// static blockem_sae_desc new_sae_desc(void) {
//   blockem_sae_desc desc = BLOCKEM_SAE_DESC_INIT;
//   return desc;
// }
// static blockem_latents_desc new_latents_desc(void) {
//   blockem_latents_desc desc = BLOCKEM_LATENTS_DESC_INIT;
//   return desc;
// }
// static blockem_plan_options new_plan_options(void) {
//   blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
//   return options;
// }
// static blockem_plan_info new_plan_info(void) {
//   blockem_plan_info info = BLOCKEM_PLAN_INFO_INIT;
//   return info;
// }
// static blockem_encode_args new_encode_args(void) {
//   blockem_encode_args args = BLOCKEM_ENCODE_ARGS_INIT;
//   return args;
// }
// static blockem_penalty_args new_penalty_args(void) {
//   blockem_penalty_args args = BLOCKEM_PENALTY_ARGS_INIT;
//   return args;
// }
import "C"

import (
	"fmt"
	"runtime"
	"unsafe"
)

// Error is a failed call: the number and the name of its status, and the library's message.
type Error struct {
	Status  int32
	Name    string
	Message string
}

func (e *Error) Error() string { return e.Name + ": " + e.Message }

// Version of the library that runs, such as "0.1.0".
func Version() string { return C.GoString(C.blockem_version_string()) }

// Sae is an opened sparse autoencoder.
type Sae struct{ handle *C.blockem_sae }

// OpenSae opens a checkpoint: the file or the folder that its owner publishes.
func OpenSae(path string) (*Sae, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	sae := new(Sae)
	err := call(func() C.blockem_status { return C.blockem_sae_open(name, nil, &sae.handle) })
	if err != nil {
		return nil, err
	}
	return sae, nil
}

// ActivationKind is the gate of an SAE.
type ActivationKind int32

const (
	Relu     ActivationKind = C.BLOCKEM_ACTIVATION_KIND_RELU
	JumpRelu ActivationKind = C.BLOCKEM_ACTIVATION_KIND_JUMPRELU
	Gated    ActivationKind = C.BLOCKEM_ACTIVATION_KIND_GATED
	TopK     ActivationKind = C.BLOCKEM_ACTIVATION_KIND_TOPK
)

// SaeTensors is an SAE as arrays, row-major; what a kind does not have is nil.
type SaeTensors struct {
	DIn, DSae, K            int64
	Kind                    ActivationKind
	EncoderWeight           []float32 // [F, d]
	EncoderBias             []float32 // [F]
	Threshold               []float32 // [F]
	GateBias, MagnitudeBias []float32 // [F]
	MagnitudeLogScale       []float32 // [F]
	DecoderBias             []float32 // [d]
	DecoderWeight           []float32 // [F, d]
	InputScale              float64
	SubtractDecoderBias     bool
	RescaleByDecoderNorm    bool
}

// NewSae makes an SAE from arrays, which the library copies.
func NewSae(tensors SaeTensors) (*Sae, error) {
	var pinned runtime.Pinner
	defer pinned.Unpin()
	rows, columns := tensors.DSae, tensors.DIn
	desc := C.new_sae_desc()
	desc.encoder_weight = view(&pinned, tensors.EncoderWeight, rows, columns)
	desc.encoder_layout = C.BLOCKEM_ENCODER_LAYOUT_F_D
	desc.encoder_bias = view(&pinned, tensors.EncoderBias, rows)
	desc.threshold = view(&pinned, tensors.Threshold, rows)
	desc.gate_bias = view(&pinned, tensors.GateBias, rows)
	desc.magnitude_bias = view(&pinned, tensors.MagnitudeBias, rows)
	desc.magnitude_log_scale = view(&pinned, tensors.MagnitudeLogScale, rows)
	desc.decoder_bias = view(&pinned, tensors.DecoderBias, columns)
	desc.decoder_weight = view(&pinned, tensors.DecoderWeight, rows, columns)
	desc.d_in, desc.d_sae, desc.k = C.int64_t(columns), C.int64_t(rows), C.int64_t(tensors.K)
	desc.activation_kind = C.int32_t(tensors.Kind)
	desc.input_scale = C.double(tensors.InputScale)
	desc.apply_b_dec_to_input = flag(tensors.SubtractDecoderBias)
	desc.rescale_acts_by_decoder_norm = flag(tensors.RescaleByDecoderNorm)
	sae := new(Sae)
	err := call(func() C.blockem_status { return C.blockem_sae_from_tensors(&desc, &sae.handle) })
	if err != nil {
		return nil, err
	}
	return sae, nil
}

// Close frees the SAE; plans made from it live on.
func (s *Sae) Close() {
	C.blockem_sae_free(s.handle)
	s.handle = nil
}

// Latents is a set of blocked latents.
type Latents struct{ handle *C.blockem_latents }

// OpenLatents reads the authors' K0.json.
func OpenLatents(path string, sae *Sae) (*Latents, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	set := new(Latents)
	err := call(func() C.blockem_status {
		return C.blockem_latents_open(name, sae.handle, &set.handle)
	})
	if err != nil {
		return nil, err
	}
	return set, nil
}

// NewLatents registers ids; signs +1 block a rise (K+), -1 a fall (K-); nil weights mean 1 for each.
func NewLatents(ids []int64, signs []int8, weights []float32) (*Latents, error) {
	if len(signs) != len(ids) || weights != nil && len(weights) != len(ids) {
		return nil, fmt.Errorf("%d ids, %d signs, %d weights: they must have one length",
			len(ids), len(signs), len(weights))
	}
	var pinned runtime.Pinner
	defer pinned.Unpin()
	desc := C.new_latents_desc()
	desc.ids = (*C.int64_t)(pin(&pinned, ids))
	desc.signs = (*C.int8_t)(pin(&pinned, signs))
	desc.weights = (*C.float)(pin(&pinned, weights))
	desc.n = C.size_t(len(ids))
	set := new(Latents)
	err := call(func() C.blockem_status { return C.blockem_latents_create(&desc, &set.handle) })
	if err != nil {
		return nil, err
	}
	return set, nil
}

// Close frees the set; plans made from it live on.
func (l *Latents) Close() {
	C.blockem_latents_free(l.handle)
	l.handle = nil
}

// Activation is how a plan goes from pre-activations to latents.
type Activation int32

const (
	Native        Activation = C.BLOCKEM_ACTIVATION_NATIVE
	DenseRelu     Activation = C.BLOCKEM_ACTIVATION_DENSE_RELU
	Preactivation Activation = C.BLOCKEM_ACTIVATION_PREACTIVATION
)

// Plan holds the blocked rows of an SAE. It never changes: any number of goroutines may use it.
type Plan struct {
	DIn, NumLatents int
	Numerics        string
	handle          *C.blockem_plan
}

// NewPlan gathers the rows of a latent set; the SAE and the set may be closed.
func NewPlan(sae *Sae, latents *Latents, activation Activation) (*Plan, error) {
	options, info := C.new_plan_options(), C.new_plan_info()
	options.activation = C.int32_t(activation)
	plan := new(Plan)
	err := call(func() C.blockem_status {
		return C.blockem_plan_create(sae.handle, latents.handle, &options, &plan.handle)
	})
	if err != nil {
		return nil, err
	}
	err = call(func() C.blockem_status { return C.blockem_plan_info_get(plan.handle, &info) })
	if err != nil {
		plan.Close()
		return nil, err
	}
	plan.DIn, plan.NumLatents = int(info.d_in), int(info.num_latents)
	plan.Numerics = C.GoString(&info.numerics[0])
	return plan, nil
}

// Close frees the plan; no call may still be using it.
func (p *Plan) Close() {
	C.blockem_plan_free(p.handle)
	p.handle = nil
}

// Float16 and Bfloat16 are the bits of such a number.
type (
	Float16  uint16
	Bfloat16 uint16
)

// Hidden states are of one of these.
type Hidden interface{ float32 | Float16 | Bfloat16 }

// Encode returns z [T, K] of hidden [T, d], row-major: references for later calls.
func Encode[H Hidden](plan *Plan, hidden []H) ([]float32, error) {
	tokens, err := plan.tokens(len(hidden))
	if err != nil {
		return nil, err
	}
	var pinned runtime.Pinner
	defer pinned.Unpin()
	latents := make([]float32, tokens*plan.NumLatents)
	args := C.new_encode_args()
	args.hidden = view(&pinned, hidden, int64(tokens), int64(plan.DIn))
	args.latents = view(&pinned, latents, int64(tokens), int64(plan.NumLatents))
	args.workspace, args.workspace_size, err = plan.workspace(&pinned, tokens)
	if err != nil {
		return nil, err
	}
	err = call(func() C.blockem_status { return C.blockem_encode(plan.handle, &args, nil) })
	return latents, err
}

// Loss is the penalty of a batch and its gradient. Add LossSum and TokenCount up over micro-batches
// and ranks, then divide once.
type Loss struct {
	LossSum, TokenCount float64
	LatentLoss          []float64 // [K] the share of each latent in LossSum
	Grad                []float32 // [T, d] scale times the gradient of LossSum
}

// Penalty computes both in one pass over hidden [T, d]. reference [T, K] is Encode of the base
// model's hidden states; mask [T] holds each token's share, nil means 1.
func Penalty[H Hidden](plan *Plan, hidden []H, reference, mask []float32, scale float64) (*Loss, error) {
	tokens, err := plan.tokens(len(hidden))
	if err != nil {
		return nil, err
	}
	if len(reference) != tokens*plan.NumLatents || mask != nil && len(mask) != tokens {
		return nil, fmt.Errorf("%d tokens of %d latents, but reference has %d elements and mask %d",
			tokens, plan.NumLatents, len(reference), len(mask))
	}
	loss := &Loss{
		LatentLoss: make([]float64, plan.NumLatents),
		Grad:       make([]float32, len(hidden)),
	}
	sums := make([]float64, 2)
	var pinned runtime.Pinner
	defer pinned.Unpin()
	t, d, k := int64(tokens), int64(plan.DIn), int64(plan.NumLatents)
	args := C.new_penalty_args()
	args.hidden = view(&pinned, hidden, t, d)
	args.reference = view(&pinned, reference, t, k)
	args.mask = view(&pinned, mask, t)
	args.loss_sum = view(&pinned, sums[:1], 1)
	args.token_count = view(&pinned, sums[1:], 1)
	args.latent_loss = view(&pinned, loss.LatentLoss, k)
	args.grad_hidden = view(&pinned, loss.Grad, t, d)
	args.scale = C.double(scale)
	args.workspace, args.workspace_size, err = plan.workspace(&pinned, tokens)
	if err != nil {
		return nil, err
	}
	err = call(func() C.blockem_status { return C.blockem_penalty(plan.handle, &args, nil) })
	if err != nil {
		return nil, err
	}
	loss.LossSum, loss.TokenCount = sums[0], sums[1]
	return loss, nil
}

func (p *Plan) tokens(elements int) (int, error) {
	if elements%p.DIn != 0 {
		return 0, fmt.Errorf("%d elements of hidden are no whole rows of %d", elements, p.DIn)
	}
	return elements / p.DIn, nil
}

// Scratch memory for so many tokens, from a multiple of 64 bytes on.
func (p *Plan) workspace(pinned *runtime.Pinner, tokens int) (unsafe.Pointer, C.size_t, error) {
	var bytes C.size_t
	err := call(func() C.blockem_status {
		return C.blockem_plan_workspace_size(p.handle, C.int64_t(tokens), &bytes)
	})
	if err != nil {
		return nil, 0, err
	}
	start := pin(pinned, make([]byte, int(bytes)+63))
	return unsafe.Add(start, -uintptr(start)&63), bytes, nil
}

// Makes a call, and reads the message where it failed before another call can change it.
func call(work func() C.blockem_status) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	status := work()
	if status == C.BLOCKEM_STATUS_OK {
		return nil
	}
	message := make([]byte, C.blockem_last_error(nil, 0)+1)
	C.blockem_last_error((*C.char)(unsafe.Pointer(&message[0])), C.size_t(len(message)))
	name := C.GoString(C.blockem_status_name(status))
	return &Error{int32(status), name, string(message[:len(message)-1])}
}

// A row-major view of a slice, which stays where it is until pinned lets go; nil is absent.
func view[T Hidden | float64](pinned *runtime.Pinner, data []T, shape ...int64) C.blockem_tensor {
	tensor := C.new_tensor()
	tensor.data = pin(pinned, data)
	tensor.dtype = dtype(data)
	tensor.ndim = C.int32_t(len(shape))
	stride := int64(1)
	for i := len(shape) - 1; i >= 0; i-- {
		tensor.shape[i], tensor.stride[i] = C.int64_t(shape[i]), C.int64_t(stride)
		stride *= shape[i]
	}
	return tensor
}

func dtype(data any) C.int32_t {
	switch data.(type) {
	case []Float16:
		return C.BLOCKEM_DTYPE_F16
	case []Bfloat16:
		return C.BLOCKEM_DTYPE_BF16
	case []float64:
		return C.BLOCKEM_DTYPE_F64
	default:
		return C.BLOCKEM_DTYPE_F32
	}
}

func pin[T any](pinned *runtime.Pinner, data []T) unsafe.Pointer {
	if len(data) == 0 {
		return nil
	}
	pinned.Pin(&data[0])
	return unsafe.Pointer(&data[0])
}

func flag(set bool) C.int32_t {
	if set {
		return 1
	}
	return 0
}
