package xdsgen

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
)

// message is a generated Envoy message with its own validation.
type message interface {
	proto.Message
	ValidateAll() error
}

// pack validates m and encodes it into an Any, the same bytes each time.
func pack(m message) (*anypb.Any, error) {
	if err := m.ValidateAll(); err != nil {
		return nil, err
	}
	return packPlain(m)
}

// packPlain is pack for messages that have no validation of their own.
func packPlain(m proto.Message) (*anypb.Any, error) {
	a := new(anypb.Any)
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return a, nil
}

// encode validates m and makes the resource of it.
func encode(typeURL, name string, m message) (*Resource, error) {
	a, err := pack(m)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(a.Value)
	return &Resource{Type: typeURL, Name: name, Version: hex.EncodeToString(sum[:8]), Any: a}, nil
}

// stringStruct is a Struct of string values.
func stringStruct(kv map[string]string) *structpb.Struct {
	s := &structpb.Struct{Fields: make(map[string]*structpb.Value, len(kv))}
	for k, v := range kv {
		s.Fields[k] = structpb.NewStringValue(v)
	}
	return s
}
