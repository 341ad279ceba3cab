package controlplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// StateFileName is the name of the state file within the run directory.
const StateFileName = "controlplane.json"

// StateFile is how the CLI finds a running control plane.
type StateFile struct {
	PID       int               `json:"pid"`
	Started   time.Time         `json:"started"`
	Version   string            `json:"version,omitempty"`
	Addresses map[string]string `json:"addresses"`
	// TrustDomain, ConfigDir and DataDir are those of Config.
	TrustDomain string `json:"trust_domain"`
	ConfigDir   string `json:"config_dir,omitempty"`
	DataDir     string `json:"data_dir,omitempty"`
}

// ReadStateFile reads the state file of a run directory; fs.ErrNotExist is in the chain when no
// control plane runs there. One that was killed leaves its file behind: check the process.
func ReadStateFile(runDir string) (StateFile, error) {
	path := filepath.Join(runDir, StateFileName)
	b, err := os.ReadFile(path)
	if err != nil {
		return StateFile{}, fmt.Errorf("state of the control plane: %w", err)
	}
	var s StateFile
	if err := json.Unmarshal(b, &s); err != nil {
		return StateFile{}, fmt.Errorf("state of the control plane: %s: %w: remove it", path, err)
	}
	return s, nil
}

// writeStateFile replaces the file whole, so that nobody reads half of it.
func writeStateFile(runDir string, s StateFile) error {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return fmt.Errorf("run directory: %w: pass another one with --run-dir", err)
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(runDir, StateFileName+".*")
	if err != nil {
		return fmt.Errorf("run directory: %w: pass another one with --run-dir", err)
	}
	_, err = f.Write(append(b, '\n'))
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(runDir, StateFileName))
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("run directory %s: %w: pass another one with --run-dir", runDir, err)
	}
	return nil
}

// removeStateFile removes the file if it still is this process's.
func removeStateFile(runDir string) {
	if s, err := ReadStateFile(runDir); err == nil && s.PID == os.Getpid() {
		_ = os.Remove(filepath.Join(runDir, StateFileName))
	}
}
