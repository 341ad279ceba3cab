package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
)

// The file of the authority: a first line of magic and version, then a PEM certificate and its PEM
// key (PKCS#8). One file, so that it is there whole or not at all.
const (
	stateFile    = "ca.pem"
	stateMagic   = "inlay-ca"
	stateVersion = 1
	rootLife     = 10 * 365 * 24 * time.Hour
	maxState     = 64 << 10
)

// state is what is on disk.
type state struct {
	path string
	root *x509.Certificate
	key  crypto.Signer
}

// newRoot makes a self-signed root for td.
func newRoot(td spiffeid.TrustDomain, now time.Time, random io.Reader) (*state, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), random)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"inlay"}, CommonName: td.Name()},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(rootLife),
		// X509-SVID, section 4.3: "SVID signing certificates MUST set `keyCertSign`."
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            1, // room for one intermediate below a root that lives ten years
		// Section 3.2: "the SPIFFE ID of a signing certificate MUST NOT have a path component".
		URIs: []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(random, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &state{root: root, key: key}, nil
}

// check says whether the state serves this trust domain now.
func (s *state) check(td spiffeid.TrustDomain, now time.Time) error {
	if len(s.root.URIs) != 1 || s.root.URIs[0].String() != td.IDString() {
		return fmt.Errorf("%s: it is of %v, want %s: run with --trust-domain of that name, or with another data directory", s.path, s.root.URIs, td.IDString())
	}
	if !now.Before(s.root.NotAfter) {
		return fmt.Errorf("%s: the root expired at %s: move the file away; a new root is made, and every node fetches it", s.path, s.root.NotAfter.Format(time.RFC3339))
	}
	if now.Before(s.root.NotBefore) {
		return fmt.Errorf("%s: the root is valid from %s, and it is %s: set the clock of this machine", s.path, s.root.NotBefore.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	return nil
}

// openState reads the state in dir, or stores the one that create makes. Two processes that start
// at once get the same one.
func openState(dir string, create func() (*state, error)) (*state, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("%w: want a directory that can be written (--data)", err)
	}
	path := filepath.Join(dir, stateFile)
	s, err := readState(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return s, err
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if s, err := readState(path); !errors.Is(err, fs.ErrNotExist) {
		return s, err // somebody else was first
	}
	s, err = create()
	if err != nil {
		return nil, err
	}
	raw, err := s.encode()
	if err != nil {
		return nil, err
	}
	if err := writeAtomic(path, raw); err != nil {
		return nil, fmt.Errorf("write %s: %w: want a directory that can be written, with space", path, err)
	}
	return readState(path)
}

func readState(path string) (*state, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkFile(path, info); err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	s, err := decodeState(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	s.path = path
	return s, nil
}

// checkFile refuses a key that others can read or put there.
func checkFile(path string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: it is %s: want a regular file", path, info.Mode().Type())
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return fmt.Errorf("%s: permissions %04o let others read the authority's key: want 0600: run: chmod 600 %s", path, perm, path)
	}
	if owner, ok := ownerOf(info); ok && owner != uint32(os.Geteuid()) && owner != 0 {
		return fmt.Errorf("%s: it belongs to user %d: want %d: run: chown %d %s", path, owner, os.Geteuid(), os.Geteuid(), path)
	}
	return nil
}

func (s *state) encode() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(s.key)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %d\n", stateMagic, stateVersion)
	for _, block := range []*pem.Block{{Type: "CERTIFICATE", Bytes: s.root.Raw}, {Type: "PRIVATE KEY", Bytes: key}} {
		if err := pem.Encode(&b, block); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), nil
}

// decodeState reads the file's bytes. Its errors never hold any of them.
func decodeState(raw []byte) (*state, error) {
	if len(raw) > maxState {
		return nil, fmt.Errorf("more than %d bytes: not written by inlay", maxState)
	}
	first, rest, _ := bytes.Cut(raw, []byte("\n"))
	word, number, ok := strings.Cut(string(first), " ")
	if !ok || word != stateMagic {
		return nil, fmt.Errorf("the first line is not %q: not written by inlay; restore the file from a backup, or move it away for a new root", stateMagic+" VERSION")
	}
	version, err := strconv.Atoi(number)
	if err != nil || version < 1 {
		return nil, errors.New("the version in the first line is no number from 1 on: restore the file from a backup")
	}
	if version > stateVersion {
		return nil, fmt.Errorf("version %d is newer than this program knows (%d): run a newer inlay", version, stateVersion)
	}
	certPEM, rest := pem.Decode(rest)
	if certPEM == nil || certPEM.Type != "CERTIFICATE" {
		return nil, errors.New("no PEM certificate after the first line: restore the file from a backup")
	}
	keyPEM, _ := pem.Decode(rest)
	if keyPEM == nil || keyPEM.Type != "PRIVATE KEY" {
		return nil, errors.New("no PEM private key after the certificate: restore the file from a backup")
	}
	root, err := x509.ParseCertificate(certPEM.Bytes)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	if !root.IsCA || root.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, errors.New("the certificate is not an authority: restore the file from a backup")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keyPEM.Bytes)
	if err != nil {
		return nil, errors.New("the private key is not PKCS#8: restore the file from a backup")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("private key of type %T: want ECDSA P-256", parsed)
	}
	if !key.PublicKey.Equal(root.PublicKey) {
		return nil, errors.New("the private key does not belong to the certificate: restore the file from a backup")
	}
	return &state{root: root, key: key}, nil
}

// writeAtomic makes path appear with all of raw, 0600, and survive a loss of power.
func writeAtomic(path string, raw []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".ca-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // after the rename it is gone already
	_, err = f.Write(raw)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// lockDir keeps other processes from creating a root in dir until unlock is called.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "ca.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w: want a directory that can be written (--data)", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { _ = f.Close() }, nil
}

// ownerOf is the user a file belongs to.
func ownerOf(info fs.FileInfo) (uint32, bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return st.Uid, true
}
