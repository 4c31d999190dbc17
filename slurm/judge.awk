# Check the reports of slurm/node.sh on every node: "fact HOST NAME VALUE" and "error HOST first|after MESSAGE", separated by tabs.
# Print the errors by host and end with 1, or print the facts that nodes agree on.   usage: awk -f judge.awk -v hosts="a b c" FILE
BEGIN { FS = "\t"; num_hosts = split(hosts, host, " ") }
$1 == "fact" {
    reported[$2] = 1
    if (!($3 in num_values)) names[++num_names] = $3
    if (($3, $4) in where) where[$3, $4] = where[$3, $4] ", " $2
    else { where[$3, $4] = $2; value[$3, ++num_values[$3]] = $4 }
}
$1 == "error" {
    reported[$2] = 1
    if ($4 in hosts_of) hosts_of[$4] = hosts_of[$4] ", " $2
    else { hosts_of[$4] = $2; errors[++num_errors] = $4; urgency[num_errors] = $3; num_first += $3 == "first" }
}
function complain(text) { print "error: " text > "/dev/stderr"; complaints++ }
END {
    # "after": an error that may only be a consequence of another node's, and then is not printed
    for (i = 1; i <= num_errors; i++) if (urgency[i] == "first" || !num_first) complain(hosts_of[errors[i]] ": " errors[i])
    for (i = 1; i <= num_hosts; i++) if (!(host[i] in reported)) complain(host[i] ": gave no answer. See its output above.")
    agreed = ""
    for (i = 1; i <= num_names; i++) {
        name = names[i]
        text = ""
        for (j = 1; j <= num_values[name]; j++) {
            hosts_alike = where[name, value[name, j]]
            text = text "; " value[name, j] " on " hosts_alike
            if (name == "machine" && hosts_alike ~ /, /)
                complain(hosts_alike ": are several names of one machine. Leave all but one out, or set ONE_MACHINE=yes.")
        }
        if (name == "machine") continue # differs between nodes, and is not printed
        if (num_values[name] > 1 && name != "commit") complain(name " differs between nodes: " substr(text, 3) ". Make it the same on all.")
        if (value[name, 1] != "") agreed = agreed ", " name " " value[name, 1]
    }
    if (complaints) exit 1
    print num_hosts (num_hosts > 1 ? " nodes agree: " : " node: ") substr(agreed, 3)
}
