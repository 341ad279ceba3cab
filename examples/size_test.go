package examples_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestSize: the gRPC example is at most 3 MB larger than the same program on plain grpc-go,
// net/http and the OTel API.
func TestSize(t *testing.T) {
	with, without := sizeOf(t, "./grpc"), sizeOf(t, "./testdata/plain")
	t.Logf("with the SDK %.2f MB, plain %.2f MB: %+.2f MB", mb(with), mb(without), mb(with-without))
	if with-without > 3_000_000 {
		t.Errorf("the SDK adds %.2f MB, want at most 3", mb(with-without))
	}
}

func mb(n int64) float64 { return float64(n) / 1e6 }

func sizeOf(t *testing.T, pkg string) int64 {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "bin")
	cmd := exec.Command("go", "build", "-o", bin, pkg)
	cmd.Env = append(os.Environ(), "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, out)
	}
	st, err := os.Stat(bin)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}
