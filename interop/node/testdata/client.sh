# A shell that has curl make the calls it is told to, one line each, and answers each with a line of
# JSON. The words are those of clients_test.go.
while read -r op net host port; do
  flag=
  case $net in
    4) flag=-4 ;;
    6) flag=-6 ;;
    mapped) host="::ffff:$host" ;;
  esac
  case $host in
    *:*) host="[$host]" ;;
  esac
  curl --silent --globoff --noproxy '*' --max-time 2 $flag --output "$CURL_OUT" \
    --write-out '{"peer":"%{remote_ip} %{remote_port}","local":"%{local_ip} %{local_port}","curl":%{exitcode},"fault":"%{errormsg}","text":"' "http://$host:$port/"
  [ -s "$CURL_OUT" ] && tr -d '\r\n' < "$CURL_OUT"
  : > "$CURL_OUT"
  echo '"}'
done
