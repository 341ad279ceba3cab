// Command protogen compiles the repository's .proto files and runs the pinned protoc plugins on
// them, so that generating needs Go and nothing else.
//
// Usage: protogen ROOT, where ROOT is the repository. Import paths are inlay/... and stand under
// ROOT/proto; what is generated goes to the package that go_package names.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"

	"google.golang.org/genproto/googleapis/rpc/status"
)

const module = "github.com/inlay-mesh/inlay/"

// connectOf names the files whose services are spoken over Connect, and where their stubs go:
// the root module must not require connect, so they live apart from the messages.
var connectOf = map[string]string{"inlay/admin/v1/admin.proto": "controlplane/admin/adminconnect"}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: protogen ROOT")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "protogen:", err)
		os.Exit(1)
	}
}

func run(root string) error {
	files, err := sources(filepath.Join(root, "proto"))
	if err != nil {
		return err
	}
	all, err := compile(filepath.Join(root, "proto"), files)
	if err != nil {
		return err
	}
	for _, f := range files {
		plugins := []plugin{{"protoc-gen-go", "module=" + strings.TrimSuffix(module, "/"), ""}}
		if dir, ok := connectOf[f]; ok {
			plugins = append(plugins, plugin{"protoc-gen-connect-go", "paths=source_relative,package_suffix=connect", dir})
		} else {
			plugins = append(plugins, plugin{"protoc-gen-go-grpc", "module=" + strings.TrimSuffix(module, "/"), ""})
		}
		for _, p := range plugins {
			if err := p.run(root, f, all); err != nil {
				return fmt.Errorf("%s: %s: %w", f, p.name, err)
			}
		}
	}
	return nil
}

func sources(dir string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".proto") {
			rel, _ := filepath.Rel(dir, path)
			files = append(files, filepath.ToSlash(rel))
		}
		return err
	})
	slices.Sort(files)
	return files, err
}

// compile returns every file with its imports before it, as plugins want them.
func compile(dir string, files []string) ([]*descriptorpb.FileDescriptorProto, error) {
	known := protocompile.ResolverFunc(func(path string) (protocompile.SearchResult, error) {
		if path == "google/rpc/status.proto" {
			return protocompile.SearchResult{Desc: status.File_google_rpc_status_proto}, nil
		}
		return protocompile.SearchResult{}, os.ErrNotExist
	})
	c := protocompile.Compiler{
		Resolver: protocompile.WithStandardImports(protocompile.CompositeResolver{
			&protocompile.SourceResolver{ImportPaths: []string{dir}}, known,
		}),
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	compiled, err := c.Compile(context.Background(), files...)
	if err != nil {
		return nil, err
	}
	var out []*descriptorpb.FileDescriptorProto
	seen := map[string]bool{}
	var add func(fd protoreflect.FileDescriptor)
	add = func(fd protoreflect.FileDescriptor) {
		if seen[fd.Path()] {
			return
		}
		seen[fd.Path()] = true
		for i := range fd.Imports().Len() {
			add(fd.Imports().Get(i).FileDescriptor)
		}
		out = append(out, protodesc.ToFileDescriptorProto(fd))
	}
	for _, fd := range compiled {
		add(fd)
	}
	for i, fd := range out { // comments travel only in the parser's own result
		if r, ok := compiled.FindFileByPath(fd.GetName()).(interface {
			FileDescriptorProto() *descriptorpb.FileDescriptorProto
		}); ok {
			out[i] = r.FileDescriptorProto()
		}
	}
	return out, nil
}

type plugin struct{ name, param, dir string }

func (p plugin) run(root, file string, all []*descriptorpb.FileDescriptorProto) error {
	req, err := proto.Marshal(&pluginpb.CodeGeneratorRequest{
		FileToGenerate: []string{file},
		Parameter:      proto.String(p.param),
		ProtoFile:      all,
		CompilerVersion: &pluginpb.Version{
			Major: proto.Int32(0), Minor: proto.Int32(0), Patch: proto.Int32(0), Suffix: proto.String("inlay"),
		},
	})
	if err != nil {
		return err
	}
	cmd := exec.Command("go", "tool", p.name)
	cmd.Dir, cmd.Stdin, cmd.Stderr = filepath.Join(root, "tools"), bytes.NewReader(req), os.Stderr
	cmd.Env = append(os.Environ(), "GOWORK=off")
	raw, err := cmd.Output()
	if err != nil {
		return err
	}
	var resp pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(raw, &resp); err != nil {
		return err
	}
	if resp.Error != nil {
		return fmt.Errorf("%s", resp.GetError())
	}
	for _, f := range resp.File {
		name, content := filepath.Join(root, f.GetName()), f.GetContent()
		if p.dir != "" { // the plugin names the package after that of the messages; ours is named for its directory
			name = filepath.Join(root, p.dir, filepath.Base(f.GetName()))
			given := filepath.Base(filepath.Dir(f.GetName()))
			content = strings.Replace(content, "package "+given, "package "+filepath.Base(p.dir), 1)
		}
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}
