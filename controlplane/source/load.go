package source

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Limits bound what a directory may hold. A zero field means its default.
type Limits struct {
	Files     int   // default 10,000
	FileBytes int64 // default 1 MiB
	Bytes     int64 // of all files; default 64 MiB
	Depth     int   // of directories below the root; default 32
}

func (l Limits) withDefaults() Limits {
	if l.Files == 0 {
		l.Files = 10_000
	}
	if l.FileBytes == 0 {
		l.FileBytes = 1 << 20
	}
	if l.Bytes == 0 {
		l.Bytes = 64 << 20
	}
	if l.Depth == 0 {
		l.Depth = 32
	}
	return l
}

// Load reads a directory once: every *.yaml and *.yml below it. Files and directories whose name
// begins with a dot are left out, and so are those of editors, which have other endings. A path to
// one file gives that file. Errors name the file and say what is wrong with it, all of them.
func Load(path string, limits Limits) (Revision, error) {
	s, err := scan(path, limits.withDefaults())
	if err != nil {
		return Revision{}, err
	}
	files, err := s.read(limits.withDefaults())
	if err != nil {
		return Revision{}, err
	}
	return NewRevision(files), nil
}

// stamp changes when a file does, except for a change within the clock's grain that keeps the
// size; that one is seen by its event.
type stamp struct {
	size, mtime int64
	dev, inode  uint64
}

// found is a file of a scan.
type found struct {
	rel  string // with forward slashes
	path string
	stamp
}

// listing is what a scan found: files by walking order, and the directories to watch.
type listing struct {
	files []found
	dirs  []string
}

func (l *listing) equal(m *listing) bool {
	if len(l.files) != len(m.files) {
		return false
	}
	for i := range l.files {
		if l.files[i] != m.files[i] {
			return false
		}
	}
	return true
}

func wanted(name string) bool {
	ext := filepath.Ext(name)
	return (ext == ".yaml" || ext == ".yml") && !strings.HasPrefix(name, ".")
}

type dirID struct{ dev, inode uint64 }

type scanner struct {
	limits Limits
	out    listing
	seen   map[dirID]bool // directories above, against symbolic links in a circle
	watch  map[string]bool
	errs   []error
}

// scan lists root without reading its files.
func scan(root string, limits Limits) (*listing, error) {
	info, err := os.Stat(root)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", root, cause(err))
	}
	s := &scanner{limits: limits, seen: map[dirID]bool{}, watch: map[string]bool{}}
	if info.IsDir() {
		s.dir(root, "", info, 0)
	} else {
		s.file(root, filepath.Base(root), info)
	}
	if len(s.out.files) > limits.Files {
		s.errs = append(s.errs, fmt.Errorf("configuration %s: %d files: want at most %d", root, len(s.out.files), limits.Files))
	}
	var total int64
	for _, f := range s.out.files {
		total += f.size
	}
	if total > limits.Bytes {
		s.errs = append(s.errs, fmt.Errorf("configuration %s: %d bytes in all files: want at most %d", root, total, limits.Bytes))
	}
	return &s.out, errors.Join(s.errs...)
}

// cause leaves the path out of an error that names it already.
func cause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

func (s *scanner) fail(rel string, err error) {
	s.errs = append(s.errs, fmt.Errorf("configuration file %s: %w", rel, cause(err)))
}

func (s *scanner) addWatch(dir string) {
	if !s.watch[dir] {
		s.watch[dir] = true
		s.out.dirs = append(s.out.dirs, dir)
	}
}

func (s *scanner) dir(path, rel string, info fs.FileInfo, depth int) {
	if depth > s.limits.Depth {
		s.fail(rel, fmt.Errorf("directories nested deeper than %d: want fewer", s.limits.Depth))
		return
	}
	id := identity(info)
	if s.seen[id] {
		return // a symbolic link to a directory above
	}
	s.seen[id] = true
	defer delete(s.seen, id)
	s.addWatch(path)
	entries, err := os.ReadDir(path)
	if err != nil {
		s.fail(rel+"/", err)
		return
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") || len(s.out.files) > s.limits.Files {
			continue
		}
		full, sub := filepath.Join(path, name), name
		if rel != "" {
			sub = rel + "/" + name
		}
		link := e.Type()&fs.ModeSymlink != 0
		if !link && !e.IsDir() && !wanted(name) {
			continue
		}
		info, err := os.Stat(full) // follows links
		switch {
		case errors.Is(err, fs.ErrNotExist) && (!link || !wanted(name)):
			continue // removed since, or a dangling link that is no configuration
		case err != nil:
			s.fail(sub, err)
		case info.IsDir():
			s.dir(full, sub, info, depth+1)
		case wanted(name):
			s.file(full, sub, info)
			if link {
				// The file it leads to changes elsewhere.
				if real, err := filepath.EvalSymlinks(full); err == nil {
					s.addWatch(filepath.Dir(real))
				}
			}
		}
	}
}

func (s *scanner) file(path, rel string, info fs.FileInfo) {
	switch {
	case !info.Mode().IsRegular():
		s.fail(rel, fmt.Errorf("not a regular file (%s): want one", info.Mode().Type()))
	case info.Size() > s.limits.FileBytes:
		s.fail(rel, fmt.Errorf("%d bytes: want at most %d; split it into several files", info.Size(), s.limits.FileBytes))
	default:
		id := identity(info)
		s.out.files = append(s.out.files, found{rel, path, stamp{info.Size(), info.ModTime().UnixNano(), id.dev, id.inode}})
	}
}

// identity tells files and directories apart by device and inode.
func identity(info fs.FileInfo) dirID {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return dirID{uint64(st.Dev), st.Ino} //nolint:unconvert // an int32 on darwin
	}
	return dirID{}
}

// read reads every file of a listing.
func (l *listing) read(limits Limits) ([]File, error) {
	var files []File
	var errs []error
	for _, f := range l.files {
		data, err := readFile(f.path, limits.FileBytes)
		if err != nil {
			errs = append(errs, fmt.Errorf("configuration file %s: %w", f.rel, cause(err)))
			continue
		}
		files = append(files, File{Path: f.rel, Data: data})
	}
	return files, errors.Join(errs...)
}

// readFile reads at most most bytes: a file may grow after it was listed.
func readFile(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > most {
		return nil, fmt.Errorf("more than %d bytes; split it into several files", most)
	}
	return data, nil
}
