// The BLOCK-EM penalty from Go: holds latents of an SAE where the base model had them.
//
//	penalty SAE K0.json
//
// "Training" is gradient descent on the hidden states themselves: they start where a fine-tuned
// model has drifted to, and the printed penalty falls to nothing. A real trainer adds Grad to the
// gradient that arrives at the layer's output.
package main

import (
	"errors"
	"fmt"
	"math/rand"
	"os"

	"blockem"
)

const tokens, steps = 96, 8

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: penalty SAE K0.json")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		var failed *blockem.Error
		if errors.As(err, &failed) {
			fmt.Fprintf(os.Stderr, "status %d\n", failed.Status)
		}
		os.Exit(1)
	}
}

func run(saePath, latentsPath string) error {
	fmt.Println("libblockem", blockem.Version())
	plan, err := makePlan(saePath, latentsPath)
	if err != nil {
		return err
	}
	defer plan.Close()
	fmt.Printf("plan: d %d, K %d, %s\n", plan.DIn, plan.NumLatents, plan.Numerics)

	// The base model's hidden states give the reference, and fine-tuning has moved them.
	random := rand.New(rand.NewSource(12345))
	hidden := make([]float32, tokens*plan.DIn)
	for i := range hidden {
		hidden[i] = 2*random.Float32() - 1
	}
	reference, err := blockem.Encode(plan, hidden)
	if err != nil {
		return err
	}
	for i := range hidden {
		hidden[i] += random.Float32() - 0.5
	}
	return descend(plan, hidden, reference)
}

func makePlan(saePath, latentsPath string) (*blockem.Plan, error) {
	sae, err := blockem.OpenSae(saePath)
	if err != nil {
		return nil, err
	}
	defer sae.Close()
	latents, err := blockem.OpenLatents(latentsPath, sae)
	if err != nil {
		return nil, err
	}
	defer latents.Close()
	// Without the gate a latent that has fallen below its threshold still has a gradient.
	return blockem.NewPlan(sae, latents, blockem.Preactivation)
}

func descend(plan *blockem.Plan, hidden, reference []float32) error {
	first, last := 0.0, 0.0
	for step := 0; step <= steps; step++ {
		loss, err := blockem.Penalty(plan, hidden, reference, nil, 1)
		if err != nil {
			return err
		}
		fmt.Printf("step %d  loss %.6f  (sum %.4f over %.0f tokens)\n",
			step, loss.LossSum/loss.TokenCount, loss.LossSum, loss.TokenCount)
		if last = loss.LossSum; step == 0 {
			first = last
		}
		squares := 0.0
		for _, g := range loss.Grad {
			squares += float64(g) * float64(g)
		}
		if squares == 0 {
			break
		}
		// Polyak's step, loss / |gradient|^2, needs no learning rate.
		rate := float32(loss.LossSum / squares)
		for i, g := range loss.Grad {
			hidden[i] -= rate * g
		}
	}
	if first == 0 || last >= 0.1*first {
		return fmt.Errorf("the penalty went from %g to %g: it did not fall", first, last)
	}
	return nil
}
