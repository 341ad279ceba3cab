package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
)

// account is who a managed program runs as.
type account struct {
	uid, gid uint32
	groups   []uint32 // supplementary, as a login would give
	name     string   // empty for a number without an account
	home     string
	shell    string
}

// noGroup is the group of a number without an account: it owns nothing.
const noGroup = 65534

// errNoUser says that root would have to be meant, and is not.
var errNoUser = errors.New("--user is missing: the program runs as root only when root is named: pass --user NAME, or --user root")

// programAccount is whose the program is to be: that of --user, else of whoever called sudo. Root is
// taken only when it is named.
func programAccount(flag string, env func(string) string) (account, error) {
	if flag != "" {
		return lookupAccount(flag)
	}
	sudo := env("SUDO_UID")
	if sudo == "" || sudo == "0" {
		return account{}, usageError(errNoUser)
	}
	a, err := lookupAccount(sudo)
	if err == nil && a.name == "" {
		// An account that only sudo knows: it says the group too.
		if gid, err := strconv.ParseUint(env("SUDO_GID"), 10, 32); err == nil {
			a.gid = uint32(gid)
		}
	}
	return a, err
}

// lookupAccount finds an account by its name or number.
func lookupAccount(s string) (account, error) {
	u, err := user.Lookup(s)
	if err == nil {
		return accountOf(u)
	}
	uid, numeric := parseUID(s)
	if !numeric {
		return account{}, usageError(fmt.Errorf("--user %q: no such user on this machine: want a name or a number", s))
	}
	if u, err = user.LookupId(s); err == nil {
		return accountOf(u)
	}
	return account{uid: uid, gid: noGroup, home: "/", shell: "/bin/sh"}, nil
}

// parseUID reads a user number. The highest one is none: the kernel takes it for "unchanged".
func parseUID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n != 1<<32-1
}

func accountOf(u *user.User) (account, error) {
	uid, ok1 := parseUID(u.Uid)
	gid, ok2 := parseUID(u.Gid)
	if !ok1 || !ok2 {
		return account{}, fmt.Errorf("user %s: number %q, group %q: want numbers", u.Username, u.Uid, u.Gid)
	}
	a := account{uid: uid, gid: gid, name: u.Username, home: u.HomeDir, shell: loginShell("/etc/passwd", u.Username)}
	ids, err := u.GroupIds()
	if err != nil {
		return account{}, fmt.Errorf("groups of user %s: %w", u.Username, err)
	}
	for _, id := range ids {
		if g, ok := parseUID(id); ok {
			a.groups = append(a.groups, g)
		}
	}
	slices.Sort(a.groups)
	a.groups = slices.Compact(a.groups)
	return a, nil
}

// loginShell reads the last field of an account's line; /bin/sh where there is none.
func loginShell(passwd, name string) string {
	f, err := os.Open(passwd)
	if err != nil {
		return "/bin/sh"
	}
	defer func() { _ = f.Close() }()
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Split(s.Text(), ":")
		// passwd(5): "name:password:UID:GID:GECOS:directory:shell"
		if len(fields) == 7 && fields[0] == name && fields[6] != "" {
			return fields[6]
		}
	}
	return "/bin/sh"
}

// environment is what a login of the account would change in base. What sudo left of the caller
// goes, and so does a run directory that is root's.
func (a account) environment(base []string) []string {
	set := map[string]string{"HOME": a.home, "USER": a.name, "LOGNAME": a.name, "SHELL": a.shell}
	if a.name == "" {
		set["USER"], set["LOGNAME"] = strconv.Itoa(int(a.uid)), strconv.Itoa(int(a.uid))
	}
	drop := []string{"MAIL"}
	if a.uid != 0 {
		drop = append(drop, "XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")
		if dir := fmt.Sprintf("/run/user/%d", a.uid); isDir(dir) {
			set["XDG_RUNTIME_DIR"] = dir
		}
	}
	env := slices.DeleteFunc(slices.Clone(base), func(kv string) bool {
		k, _, _ := strings.Cut(kv, "=")
		_, ours := set[k]
		return ours || strings.HasPrefix(k, "SUDO_") || slices.Contains(drop, k)
	})
	for k, v := range set {
		env = append(env, k+"="+v)
	}
	slices.Sort(env)
	return env
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
