package blockem

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

const folder = "../../tests/vectors"

// A frozen vector: tests/vectors/generate.py says what its fields mean.
type vector struct {
	meta    map[string]string
	tensors map[string]entry
	data    []byte
}

type entry struct {
	Dtype   string   `json:"dtype"`
	Shape   []int64  `json:"shape"`
	Offsets [2]int64 `json:"data_offsets"`
}

func TestVectors(t *testing.T) {
	paths, _ := filepath.Glob(filepath.Join(folder, "*.safetensors"))
	if len(paths) < 10 {
		t.Fatalf("%d vectors in %s", len(paths), folder)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".safetensors"), func(t *testing.T) {
			v := open(t, path)
			switch v.tensors["hidden"].Dtype {
			case "F32":
				check(t, v, numbers[float32](v, "hidden"), numbers[float32](v, "base_hidden"))
			case "F16":
				check(t, v, numbers[Float16](v, "hidden"), numbers[Float16](v, "base_hidden"))
			case "BF16":
				check(t, v, numbers[Bfloat16](v, "hidden"), numbers[Bfloat16](v, "base_hidden"))
			default:
				t.Fatal(v.tensors["hidden"].Dtype)
			}
		})
	}
}

func check[H Hidden](t *testing.T, v *vector, hidden, base []H) {
	plan := v.plan(t)
	defer plan.Close()
	latents, err := Encode(plan, hidden)
	must(t, err)
	near(t, v, "latents", widen(latents), "latents", 0)
	reference, err := Encode(plan, base)
	must(t, err)
	near(t, v, "reference", widen(reference), "latents", 6e-8)

	loss, err := Penalty(plan, hidden, v.floats("reference"), v.floats("mask"), v.number(t, "scale"))
	must(t, err)
	near(t, v, "loss_sum", []float64{loss.LossSum}, "loss_sum", 0)
	near(t, v, "latent_loss", loss.LatentLoss, "latent_loss", 0)
	near(t, v, "grad_hidden", widen(loss.Grad), "grad_hidden", 0)
	if want := numbers[float64](v, "token_count")[0]; loss.TokenCount != want {
		t.Errorf("token_count is %v, expected %v", loss.TokenCount, want)
	}
}

func TestErrorsHaveStatusAndMessage(t *testing.T) {
	_, err := OpenSae("no-such-folder")
	expect(t, err, 200, "IO", "no-such-folder")
	sae, err := NewSae(SaeTensors{DIn: 2, DSae: 3, EncoderWeight: make([]float32, 6),
		EncoderBias: make([]float32, 3)})
	must(t, err)
	defer sae.Close()
	_, err = OpenLatents("no-such-file.json", sae)
	expect(t, err, 200, "IO", "no-such-file.json")
	latents, err := NewLatents([]int64{3}, []int8{1}, nil)
	must(t, err)
	defer latents.Close()
	_, err = NewPlan(sae, latents, Native)
	expect(t, err, 108, "LATENT_RANGE", "3")
	if _, err = NewLatents([]int64{1, 2}, []int8{1}, nil); err == nil {
		t.Error("two ids with one sign were not refused")
	}
}

// Goroutines change threads; each still gets the message of its own call.
func TestMessagesBelongToTheirCalls(t *testing.T) {
	var group sync.WaitGroup
	for i := 0; i < 64; i++ {
		name := fmt.Sprintf("no-such-folder-%d-", i)
		group.Add(1)
		go func() {
			defer group.Done()
			for round := 0; round < 20; round++ {
				if _, err := OpenSae(name); err == nil || !strings.Contains(err.Error(), name) {
					t.Errorf("opening %s: %v", name, err)
				}
			}
		}()
	}
	group.Wait()
}

func expect(t *testing.T, err error, status int32, name, part string) {
	t.Helper()
	var failed *Error
	if !errors.As(err, &failed) {
		t.Fatalf("expected %s, got %v", name, err)
	}
	if failed.Status != status || failed.Name != name || !strings.Contains(failed.Message, part) {
		t.Errorf("expected %s (%d) about %q, got %+v", name, status, part, *failed)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ---- Vectors -----------------------------------------------------------------------------------

func open(t *testing.T, path string) *vector {
	file, err := os.ReadFile(path)
	must(t, err)
	size := binary.LittleEndian.Uint64(file)
	var header map[string]json.RawMessage
	must(t, json.Unmarshal(file[8:8+size], &header))
	v := &vector{tensors: map[string]entry{}, data: file[8+size:]}
	for name, raw := range header {
		if name == "__metadata__" {
			must(t, json.Unmarshal(raw, &v.meta))
			continue
		}
		var e entry
		must(t, json.Unmarshal(raw, &e))
		v.tensors[name] = e
	}
	return v
}

func (v *vector) plan(t *testing.T) *Plan {
	shape := v.tensors["encoder_weight"].Shape
	sae, err := NewSae(SaeTensors{
		DSae: shape[0], DIn: shape[1], K: int64(v.number(t, "k")),
		Kind: map[string]ActivationKind{
			"standard": Relu, "jumprelu": JumpRelu, "gated": Gated, "topk": TopK,
		}[v.meta["architecture"]],
		EncoderWeight: v.floats("encoder_weight"), EncoderBias: v.floats("encoder_bias"),
		Threshold: v.floats("threshold"), GateBias: v.floats("gate_bias"),
		MagnitudeBias: v.floats("magnitude_bias"), MagnitudeLogScale: v.floats("magnitude_log_scale"),
		DecoderBias: v.floats("decoder_bias"), DecoderWeight: v.floats("decoder_weight"),
		InputScale:           v.number(t, "input_scale"),
		SubtractDecoderBias:  v.meta["apply_b_dec_to_input"] == "1",
		RescaleByDecoderNorm: v.meta["rescale_acts_by_decoder_norm"] == "1",
	})
	must(t, err)
	defer sae.Close()
	latents, err := NewLatents(numbers[int64](v, "ids"), numbers[int8](v, "signs"), v.floats("weights"))
	must(t, err)
	defer latents.Close()
	plan, err := NewPlan(sae, latents, map[string]Activation{
		"native": Native, "dense_relu": DenseRelu, "preactivation": Preactivation,
	}[v.meta["activation"]])
	must(t, err)
	return plan
}

func (v *vector) number(t *testing.T, key string) float64 {
	value, err := strconv.ParseFloat(v.meta[key], 64)
	must(t, err)
	return value
}

// floats is nil for a tensor that the vector does not have; a mask of flags becomes one of shares.
func (v *vector) floats(name string) []float32 {
	e, there := v.tensors[name]
	if !there {
		return nil
	}
	if e.Dtype == "F32" {
		return numbers[float32](v, name)
	}
	shares := make([]float32, 0, e.Shape[0])
	for _, set := range numbers[uint8](v, name) {
		if set != 0 {
			set = 1
		}
		shares = append(shares, float32(set))
	}
	return shares
}

func numbers[T any](v *vector, name string) []T {
	e, there := v.tensors[name]
	if !there {
		return nil
	}
	bytes := v.data[e.Offsets[0]:e.Offsets[1]]
	var one T
	values := make([]T, len(bytes)/binary.Size(one))
	if _, err := binary.Decode(bytes, binary.LittleEndian, values); err != nil {
		panic(err)
	}
	return values
}

func widen(values []float32) []float64 {
	wide := make([]float64, len(values))
	for i, value := range values {
		wide[i] = float64(value)
	}
	return wide
}

// near: NaN where NaN is expected, elsewhere within the vector's tolerance.
func near(t *testing.T, v *vector, name string, got []float64, tolerance string, relative float64) {
	t.Helper()
	want := numbers[float64](v, name)
	if v.tensors[name].Dtype == "F32" {
		want = widen(numbers[float32](v, name))
	}
	if len(got) != len(want) {
		t.Fatalf("%s has %d elements, expected %d", name, len(got), len(want))
	}
	limit := v.number(t, "tolerance.f32."+tolerance)
	for i := range want {
		same := math.Abs(got[i]-want[i]) <= limit+relative*math.Abs(want[i])
		if !same && !(math.IsNaN(got[i]) && math.IsNaN(want[i])) {
			t.Errorf("%s[%d] is %v, expected %v within %g", name, i, got[i], want[i], limit)
		}
	}
}
